#include <gtest/gtest.h>
#include <sys/mman.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "base/cpu.h"
#include "kernels/kernel_table.h"

namespace gemloupe {
namespace {

constexpr double kRoundoff = 0x1p-24;  // of one float operation, relative
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kUntouched = -123.5f;

// Bound on the relative error of n float operations in a row (Higham's γ_n).
double Gamma(int64_t n) { return n * kRoundoff / (1 - n * kRoundoff); }

// An array whose last byte is `slack` bytes before a page that cannot be read or written.
template <class T>
class Guarded {
 public:
  explicit Guarded(size_t count, size_t slack = 0, T fill = T()) : count_(count) {
    constexpr size_t kPage = 4096;
    bytes_ = (count * sizeof(T) + slack + kPage - 1) / kPage * kPage + kPage;
    map_ = static_cast<char*>(
        mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(map_ + bytes_ - kPage, kPage, PROT_NONE);
    data_ = map_ + bytes_ - kPage - slack - count * sizeof(T);
    for (size_t i = 0; i < count; ++i) Set(i, fill);
  }
  explicit Guarded(const std::vector<T>& values, size_t slack = 0) : Guarded(values.size(), slack) {
    for (size_t i = 0; i < values.size(); ++i) Set(i, values[i]);
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(map_, bytes_); }

  T* data() { return reinterpret_cast<T*>(data_); }
  const void* bytes() const { return data_; }
  std::vector<T> Values() const {
    std::vector<T> values(count_);
    std::memcpy(values.data(), data_, count_ * sizeof(T));
    return values;
  }

 private:
  void Set(size_t i, T value) { std::memcpy(data_ + i * sizeof(T), &value, sizeof(T)); }

  size_t count_;
  size_t bytes_;
  char* map_;
  char* data_;
};

std::vector<float> Normal(size_t count, int seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(generator);
  return values;
}

// The values of 16-bit floats, from the definition of the formats.
double Bfloat16Value(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}
double Float16Value(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const int fraction = bits & 1023;
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == 31) return fraction != 0 ? NAN : sign * INFINITY;
  return sign *
         (exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25));
}

// |a − b| in units of the float spacing at b; 0 where both are NaN or the same infinity.
double Ulps(float a, double b) {
  if (std::isnan(a) && std::isnan(b)) return 0;
  const float nearest = static_cast<float>(b);
  if (a == nearest) return 0;
  const int exponent = std::max(std::ilogb(b), -126);
  return std::fabs(a - b) / std::ldexp(1.0, exponent - 23);
}

bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), 4 * a.size()) == 0;
}

// Random weights of each storage type: the stored bytes and their exact values.
enum class Storage { kFloat32, kBfloat16, kFloat16 };
constexpr Storage kStorages[] = {Storage::kFloat32, Storage::kBfloat16, Storage::kFloat16};

struct Stored {
  size_t element_bytes;
  std::vector<char> bytes;
  std::vector<double> values;
};

Stored RandomStored(Storage storage, size_t count, int seed) {
  Stored stored{storage == Storage::kFloat32 ? 4u : 2u, {}, {}};
  for (const float x : Normal(count, seed)) {
    uint32_t bits = std::bit_cast<uint32_t>(x);
    if (storage == Storage::kBfloat16) bits >>= 16;
    if (storage == Storage::kFloat16) bits = (bits >> 16 & 0x8000) | 0x3800 | (bits >> 7 & 0x3ff);
    stored.values.push_back(storage == Storage::kFloat32    ? x
                            : storage == Storage::kBfloat16 ? Bfloat16Value(bits)
                                                            : Float16Value(bits));
    const char* p = reinterpret_cast<const char*>(&bits);
    stored.bytes.insert(stored.bytes.end(), p, p + stored.element_bytes);
  }
  return stored;
}

MatmulKernel MatmulFor(const KernelTable& kernels, Storage storage) {
  return storage == Storage::kFloat32    ? kernels.matmul_f32
         : storage == Storage::kBfloat16 ? kernels.matmul_bf16
                                         : kernels.matmul_f16;
}

AccumulateKernel AccumulateFor(const KernelTable& kernels, Storage storage) {
  return storage == Storage::kFloat32    ? kernels.accumulate_f32
         : storage == Storage::kBfloat16 ? kernels.accumulate_bf16
                                         : kernels.accumulate_f16;
}

class Kernels : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    const std::string name = GetParam();
    if (name == "avx2" && DetectedIsa() >= Isa::kAvx2) kernels_ = Avx2Kernels();
    if (name == "avx512" && DetectedIsa() >= Isa::kAvx512) kernels_ = Avx512Kernels();
    if (name == "portable") kernels_ = &PortableKernels();
    if (kernels_ == nullptr) GTEST_SKIP() << "this machine cannot run the " << name << " kernels";
    ASSERT_EQ(kernels_->name, name);
  }

  const KernelTable* kernels_ = nullptr;
};

INSTANTIATE_TEST_SUITE_P(, Kernels, testing::Values("portable", "avx2", "avx512"),
                         [](const auto& info) { return info.param; });

// Strides exceed the rows; all buffers end at a forbidden page; weights may start at odd addresses.
void CheckMatmul(const KernelTable& kernels, Storage storage, int rows, int64_t n, int64_t k,
                 size_t misalign) {
  const int64_t src_stride = k + 3, weight_stride = k + 1, dst_stride = n + 2;
  const std::vector<float> x = Normal((rows - 1) * src_stride + k, 1);
  const Stored w = RandomStored(storage, (n - 1) * weight_stride + k, 2);
  Guarded<float> src(x);
  Guarded<char> weight(w.bytes, misalign);
  Guarded<float> dst((rows - 1) * dst_stride + n, 0, kUntouched);
  MatmulFor(kernels, storage)(dst.data(), dst_stride, src.data(), src_stride, weight.bytes(),
                              weight_stride, rows, n, k, {});
  const std::vector<float> y = dst.Values();
  for (size_t at = 0; at < y.size(); ++at) {
    const int64_t r = at / dst_stride, i = at % dst_stride;
    if (i >= n) {
      ASSERT_EQ(y[at], kUntouched) << "written between the rows";
      continue;
    }
    double sum = 0, magnitude = 0;
    for (int64_t j = 0; j < k; ++j) {
      const double product = x[r * src_stride + j] * w.values[i * weight_stride + j];
      sum += product;
      magnitude += std::fabs(product);
    }
    ASSERT_LE(std::fabs(y[at] - sum), Gamma(k + 1) * magnitude)
        << "storage " << int(storage) << " rows " << rows << " n " << n << " k " << k << " row "
        << r << " output " << i;
  }
}

TEST_P(Kernels, MatmulIsTheSumOfProducts) {
  for (const Storage storage : kStorages) {
    for (int rows = 1; rows <= kMaxKernelRows; ++rows) {
      for (const int64_t n : {1, 2, 3, 7, 9, 13, 17}) {
        for (const int64_t k : {1, 3, 7, 8, 15, 16, 17, 31, 33, 64, 100, 257, 1201}) {
          CheckMatmul(*kernels_, storage, rows, n, k, (rows + n + k) % 4);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST_P(Kernels, MatmulOfOneOutputIsBitEqualToTheSameAmongMany) {
  constexpr int kRows = kMaxKernelRows;
  constexpr int64_t kN = 37;
  for (const Storage storage : kStorages) {
    for (const int64_t k : {5, 67, 512, 1203}) {
      const MatmulKernel matmul = MatmulFor(*kernels_, storage);
      const std::vector<float> x = Normal(kRows * k, 3);
      const Stored w = RandomStored(storage, kN * k, 4);
      std::vector<float> all(kRows * kN), alone(kRows * kN);
      matmul(all.data(), kN, x.data(), k, w.bytes.data(), k, kRows, kN, k, {});
      for (int r = 0; r < kRows; ++r) {
        for (int64_t i = 0; i < kN; ++i) {
          matmul(&alone[r * kN + i], 1, &x[r * k], k, &w.bytes[i * k * w.element_bytes], k, 1, 1, k,
                 {});
        }
      }
      EXPECT_TRUE(SameBits(all, alone));
      for (int rows = 1; rows < kRows; ++rows) {
        std::vector<float> some(all);
        const Fetch fetch = {w.bytes.data(), 1000 * rows};  // may reach beyond what exists
        matmul(some.data(), kN, x.data(), k, w.bytes.data(), k, rows, kN, k, fetch);
        EXPECT_TRUE(SameBits(some, all)) << rows;
      }
    }
  }
}

void CheckAccumulate(const KernelTable& kernels, Storage storage, int rows, int64_t count,
                     int64_t cols, size_t misalign) {
  const int64_t coef_stride = count + 1, value_stride = cols + 3, dst_stride = cols + 2;
  const std::vector<float> a = Normal((rows - 1) * coef_stride + count, 5);
  const Stored v = RandomStored(storage, (count - 1) * value_stride + cols, 6);
  const std::vector<float> start = Normal((rows - 1) * dst_stride + cols, 7);
  Guarded<float> coef(a), dst(start);
  Guarded<char> value(v.bytes, misalign);
  AccumulateFor(kernels, storage)(dst.data(), dst_stride, coef.data(), coef_stride, value.bytes(),
                                  value_stride, rows, count, cols, {});
  const std::vector<float> y = dst.Values();
  for (size_t at = 0; at < y.size(); ++at) {
    const int64_t r = at / dst_stride, c = at % dst_stride;
    if (c >= cols) {
      ASSERT_EQ(y[at], start[at]) << "written between the rows";
      continue;
    }
    double sum = start[at], magnitude = std::fabs(start[at]);
    for (int64_t j = 0; j < count; ++j) {
      const double product = a[r * coef_stride + j] * v.values[j * value_stride + c];
      sum += product;
      magnitude += std::fabs(product);
    }
    ASSERT_LE(std::fabs(y[at] - sum), Gamma(count + 1) * magnitude)
        << "storage " << int(storage) << " rows " << rows << " count " << count << " cols " << cols
        << " row " << r << " column " << c;
  }
}

TEST_P(Kernels, AccumulateAddsTheWeightedValues) {
  for (const Storage storage : kStorages) {
    for (int rows = 1; rows <= kMaxKernelRows; ++rows) {
      for (const int64_t count : {1, 2, 15, 16, 17, 40}) {
        for (const int64_t cols : {1, 5, 8, 15, 16, 17, 33, 64, 127, 256, 301}) {
          CheckAccumulate(*kernels_, storage, rows, count, cols, (rows + count + cols) % 4);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST_P(Kernels, AccumulateIsBitEqualWhateverTheRowsColumnsAndParts) {
  constexpr int kRows = kMaxKernelRows;
  constexpr int64_t kCount = 45, kCols = 279;
  for (const Storage storage : kStorages) {
    const AccumulateKernel accumulate = AccumulateFor(*kernels_, storage);
    const std::vector<float> a = Normal(kRows * kCount, 8);
    const Stored v = RandomStored(storage, kCount * kCols, 9);
    std::vector<float> all(kRows * kCols), single(kRows * kCols);
    accumulate(all.data(), kCols, a.data(), kCount, v.bytes.data(), kCols, kRows, kCount, kCols,
               {});
    for (int r = 0; r < kRows; ++r) {
      for (int64_t c = 0; c < kCols; ++c) {
        for (int64_t j = 0; j < kCount; ++j) {
          accumulate(&single[r * kCols + c], 1, &a[r * kCount + j], 1,
                     &v.bytes[(j * kCols + c) * v.element_bytes], 1, 1, 1, 1, {});
        }
      }
    }
    EXPECT_TRUE(SameBits(all, single));
    for (int rows = 1; rows < kRows; ++rows) {
      std::vector<float> some(kRows * kCols);
      const Fetch fetch = {v.bytes.data(), 1000 * rows};
      accumulate(some.data(), kCols, a.data(), kCount, v.bytes.data(), kCols, rows, kCount, kCols,
                 fetch);
      EXPECT_EQ(std::memcmp(some.data(), all.data(), 4 * rows * kCols), 0) << rows;
    }
  }
}

std::vector<uint16_t> AllPatterns() {
  std::vector<uint16_t> bits(1 << 16);
  for (size_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<uint16_t>(i);
  return bits;
}

TEST_P(Kernels, WideningIsExactForEveryPattern) {
  const std::vector<uint16_t> bits = AllPatterns();
  std::vector<float> bf16(bits.size()), f16(bits.size());
  kernels_->bf16_to_f32(bf16.data(), bits.data(), bits.size());
  kernels_->f16_to_f32(f16.data(), bits.data(), bits.size());
  for (size_t i = 0; i < bits.size(); ++i) {
    const double exact[] = {Bfloat16Value(bits[i]), Float16Value(bits[i])};
    const float widened[] = {bf16[i], f16[i]};
    for (int format = 0; format < 2; ++format) {
      ASSERT_EQ(std::isnan(widened[format]), std::isnan(exact[format])) << i;
      if (std::isnan(exact[format])) continue;
      ASSERT_EQ(widened[format], exact[format]) << i;
      ASSERT_EQ(std::signbit(widened[format]), std::signbit(exact[format])) << i;
    }
  }
}

using Narrow = void (*)(uint16_t*, const float*, int64_t);

// Every finite value, the midpoint to the next one up in magnitude, and the floats beside it.
void CheckRounding(Narrow narrow, double value_of(uint16_t), uint16_t infinity, double overflow) {
  std::vector<float> src;
  std::vector<uint16_t> expected;
  for (uint16_t bits = 0; bits < infinity; ++bits) {
    const uint16_t next = bits + 1;
    const double above = next == infinity ? overflow : value_of(next);
    const float middle = static_cast<float>((value_of(bits) + above) / 2);
    const uint16_t even = bits % 2 == 0 ? bits : next;
    for (const uint16_t sign : {0x0000, 0x8000}) {
      const float s = sign != 0 ? -1.0f : 1.0f;
      src.insert(src.end(),
                 {s * static_cast<float>(value_of(bits)), s * std::nextafter(middle, 0.0f),
                  s * middle, s * std::nextafter(middle, kInfinity)});
      for (const int to : {+bits, +bits, +even, +next}) expected.push_back(sign | to);
    }
  }
  for (const uint16_t sign : {0x0000, 0x8000}) {
    src.push_back(sign != 0 ? -kInfinity : kInfinity);
    expected.push_back(sign | infinity);
  }
  std::vector<uint16_t> dst(src.size());
  narrow(dst.data(), src.data(), src.size());
  for (size_t i = 0; i < src.size(); ++i) ASSERT_EQ(dst[i], expected[i]) << src[i];
}

TEST_P(Kernels, RoundingToBfloat16IsToNearestEven) {
  // Above the largest bfloat16 the next step would be 2^128.
  CheckRounding(kernels_->f32_to_bf16, Bfloat16Value, 0x7f80, 0x1p128);
}

TEST_P(Kernels, RoundingToFloat16IsToNearestEven) {
  CheckRounding(kernels_->f32_to_f16, Float16Value, 0x7c00, 65536);
}

TEST_P(Kernels, RoundingKeepsNan) {
  std::vector<float> src;
  for (int bit = 0; bit < 23; ++bit) {
    for (const uint32_t sign : {0x7f800000u, 0xff800000u}) {
      src.push_back(std::bit_cast<float>(sign | 1u << bit));
      src.push_back(std::bit_cast<float>(sign | 0x7fffffu >> bit));
    }
  }
  std::vector<uint16_t> bf16(src.size()), f16(src.size());
  kernels_->f32_to_bf16(bf16.data(), src.data(), src.size());
  kernels_->f32_to_f16(f16.data(), src.data(), src.size());
  for (size_t i = 0; i < src.size(); ++i) {
    EXPECT_TRUE(std::isnan(Bfloat16Value(bf16[i]))) << i;
    EXPECT_TRUE(std::isnan(Float16Value(f16[i]))) << i;
  }
}

// A kernel that gives dst[i] from a[i], b[i] and dst[i].
using Elementwise = void (*)(const KernelTable&, float* dst, const float* a, const float* b,
                             int64_t n);

void Add(const KernelTable& t, float* dst, const float* a, const float* b, int64_t n) {
  t.add(dst, a, b, n);
}
void Mul(const KernelTable& t, float* dst, const float* a, const float* b, int64_t n) {
  t.mul(dst, a, b, n);
}
void GeluMul(const KernelTable& t, float* dst, const float* a, const float* b, int64_t n) {
  t.gelu_mul(dst, a, b, n);
}
void SigmoidMul(const KernelTable& t, float* dst, const float* a, const float* b, int64_t n) {
  t.sigmoid_mul(dst, a, b, n);
}
void Clamp(const KernelTable& t, float* dst, const float* a, const float*, int64_t n) {
  t.clamp(dst, a, -0.7f, 0.4f, n);
}
void Scale(const KernelTable& t, float* dst, const float* a, const float*, int64_t n) {
  t.scale(dst, a, 1.7f, n);
}
void AddScaled(const KernelTable& t, float* dst, const float* a, const float*, int64_t n) {
  t.add_scaled(dst, a, 1.7f, n);
}
void Exp(const KernelTable& t, float* dst, const float* a, const float*, int64_t n) {
  t.exp_sum(dst, a, 0.5f, n);
}
void Softcap(const KernelTable& t, float* dst, const float*, const float*, int64_t n) {
  t.softcap(dst, 3.0f, n);
}

TEST_P(Kernels, ElementwiseResultsDoNotDependOnTheLength) {
  constexpr int64_t kMost = 67;
  const std::vector<float> a = Normal(kMost, 10), b = Normal(kMost, 11), d = Normal(kMost, 12);
  for (const Elementwise function :
       {Add, Mul, GeluMul, SigmoidMul, Clamp, Scale, AddScaled, Exp, Softcap}) {
    std::vector<float> alone = d;
    for (int64_t i = 0; i < kMost; ++i) function(*kernels_, &alone[i], &a[i], &b[i], 1);
    for (int64_t n = 1; n <= kMost; ++n) {
      Guarded<float> x({a.begin(), a.begin() + n}), y({b.begin(), b.begin() + n});
      Guarded<float> dst({d.begin(), d.begin() + n});
      function(*kernels_, dst.data(), x.data(), y.data(), n);
      ASSERT_TRUE(SameBits(dst.Values(), {alone.begin(), alone.begin() + n})) << n;
    }
  }
}

TEST_P(Kernels, SumsAndProductsAreRoundedLikeTheTwin) {
  const std::vector<float> a = Normal(203, 13), b = Normal(203, 14), d = Normal(203, 15);
  for (const Elementwise function : {Add, Mul, Clamp, Scale, AddScaled}) {
    std::vector<float> dst = d, twin = d;
    function(*kernels_, dst.data(), a.data(), b.data(), 203);
    function(PortableKernels(), twin.data(), a.data(), b.data(), 203);
    EXPECT_TRUE(SameBits(dst, twin));
  }
}

TEST_P(Kernels, DstMayBeTheSource) {
  constexpr int64_t kN = 45;
  const std::vector<float> a = Normal(kN, 16), b = Normal(kN, 17);
  for (const Elementwise function : {Add, Mul, GeluMul, SigmoidMul, Clamp, Scale, Exp}) {
    std::vector<float> apart(kN), onto_a = a, onto_b = b;
    function(*kernels_, apart.data(), a.data(), b.data(), kN);
    function(*kernels_, onto_a.data(), onto_a.data(), b.data(), kN);
    function(*kernels_, onto_b.data(), a.data(), onto_b.data(), kN);
    EXPECT_TRUE(SameBits(onto_a, apart));
    EXPECT_TRUE(SameBits(onto_b, apart));
  }
}

TEST_P(Kernels, ConversionsStayInsideTheirArrays) {
  for (int64_t n = 1; n <= 67; ++n) {
    const std::vector<uint16_t> bits(n, 0x3c00);  // 1 as float16, 2^-7 as bfloat16
    for (const size_t misalign : {0, 1}) {
      Guarded<uint16_t> half(bits, misalign);
      Guarded<float> bf16(n), f16(n);
      kernels_->bf16_to_f32(bf16.data(), half.bytes(), n);
      kernels_->f16_to_f32(f16.data(), half.bytes(), n);
      EXPECT_EQ(bf16.Values(), std::vector<float>(n, 0x1p-7f));
      EXPECT_EQ(f16.Values(), std::vector<float>(n, 1.0f));
      Guarded<uint16_t> to_bf16(n), to_f16(n);
      kernels_->f32_to_bf16(to_bf16.data(), bf16.data(), n);
      kernels_->f32_to_f16(to_f16.data(), f16.data(), n);
      EXPECT_EQ(to_bf16.Values(), bits);
      EXPECT_EQ(to_f16.Values(), bits);
    }
  }
}

TEST_P(Kernels, TransposeMovesEveryElementAndNothingElse) {
  for (const int64_t rows : {1, 3, 4, 7, 16, 18, 35}) {
    for (const int64_t cols : {1, 2, 4, 5, 33}) {
      const int64_t src_stride = cols + 2;
      const int64_t dst_stride = rows + 3;
      const int64_t src_count = (rows - 1) * src_stride + cols;
      const int64_t dst_count = (cols - 1) * dst_stride + rows;
      Guarded<float> src(Normal(src_count, 21));
      Guarded<float> dst(dst_count, 0, kUntouched);
      kernels_->transpose(dst.data(), dst_stride, src.data(), src_stride, rows, cols);
      std::vector<float> expected(dst_count, kUntouched);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < cols; ++c) {
          expected[c * dst_stride + r] = src.Values()[r * src_stride + c];
        }
      }
      EXPECT_EQ(dst.Values(), expected) << rows << " x " << cols;
    }
  }
}

TEST_P(Kernels, RmsNormDividesByTheRootMeanSquare) {
  constexpr float kEps = 1e-6f;
  for (const int64_t n : {1, 7, 16, 33, 64, 67, 130, 1536, 2051}) {
    const std::vector<float> x = Normal(n, 18), w = Normal(n, 19);
    double squares = 0;
    for (const float value : x) squares += double(value) * value;
    const double inverse = 1 / std::sqrt(squares / n + kEps);
    Guarded<float> src(x), weight(w), dst(n);
    kernels_->rms_norm(dst.data(), src.data(), weight.data(), n, kEps);
    const std::vector<float> weighted = dst.Values();
    kernels_->rms_norm(src.data(), src.data(), nullptr, n, kEps);
    const std::vector<float> plain = src.Values();
    // The root halves the error of the sum; six more operations.
    const double bound = Gamma(n + 6);
    for (int64_t i = 0; i < n; ++i) {
      ASSERT_NEAR(plain[i], x[i] * inverse, bound * std::fabs(x[i] * inverse)) << n;
      ASSERT_NEAR(weighted[i], x[i] * inverse * w[i], bound * std::fabs(x[i] * inverse * w[i]));
    }
  }
}

TEST_P(Kernels, RmsNormOfZerosIsZero) {
  std::vector<float> x(21, 0.0f);
  kernels_->rms_norm(x.data(), x.data(), nullptr, 21, 1e-6f);
  EXPECT_EQ(x, std::vector<float>(21, 0.0f));
}

TEST_P(Kernels, RopeRotatesTheFirstPairsOnly) {
  for (const int64_t half_dim : {4, 32, 37, 128}) {
    for (const int64_t pairs : {int64_t{1}, half_dim / 4, half_dim}) {
      const std::vector<float> start = Normal(2 * half_dim, 20);
      const std::vector<float> c = Normal(pairs, 21), s = Normal(pairs, 22);
      Guarded<float> x(start), cos(c), sin(s);
      kernels_->rope(x.data(), cos.data(), sin.data(), pairs, half_dim);
      std::vector<float> twin = start;
      PortableKernels().rope(twin.data(), c.data(), s.data(), pairs, half_dim);
      EXPECT_TRUE(SameBits(x.Values(), twin));
      for (int64_t i = 0; i < half_dim; ++i) {
        const double a = start[i], b = start[i + half_dim];
        const double first = i < pairs ? a * c[i] - b * s[i] : a;
        const double second = i < pairs ? b * c[i] + a * s[i] : b;
        const double bound = Gamma(3) * (std::fabs(a) + std::fabs(b)) * 5;
        ASSERT_NEAR(twin[i], first, bound);
        ASSERT_NEAR(twin[i + half_dim], second, bound);
      }
    }
  }
}

// Floats of both signs over the whole range, every `step`-th bit pattern, NaN left out.
std::vector<float> FloatsOfEveryMagnitude(uint32_t step) {
  std::vector<float> values;
  for (uint32_t bits = 0; bits <= 0x7f800000; bits += step) {
    values.push_back(std::bit_cast<float>(bits));
    values.push_back(-std::bit_cast<float>(bits));
  }
  return values;
}

TEST_P(Kernels, SoftcapOfOneIsTanhWithinThreeUlps) {
  const std::vector<float> x = FloatsOfEveryMagnitude(1709);
  std::vector<float> y = x;
  kernels_->softcap(y.data(), 1.0f, y.size());
  for (size_t i = 0; i < x.size(); ++i) {
    ASSERT_LE(Ulps(y[i], std::tanh(double(x[i]))), 3) << x[i] << " gives " << y[i];
    ASSERT_EQ(std::signbit(y[i]), std::signbit(x[i])) << x[i];
  }
}

TEST_P(Kernels, SoftcapSaturatesAtTheCap) {
  std::vector<float> x = {0.0f, -0.0f, 1e30f, -1e30f, kInfinity, -kInfinity, kNan, 30.0f, 1e-30f};
  kernels_->softcap(x.data(), 30.0f, x.size());
  EXPECT_EQ(x[0], 0.0f);
  EXPECT_TRUE(std::signbit(x[1]));
  EXPECT_EQ((std::vector<float>{x[2], x[3], x[4], x[5]}),
            (std::vector<float>{30.0f, -30.0f, 30.0f, -30.0f}));
  EXPECT_TRUE(std::isnan(x[6]));
  EXPECT_LE(Ulps(x[7], 30 * std::tanh(1.0)), 4);
  EXPECT_LE(Ulps(x[8], 1e-30f), 4);
}

TEST_P(Kernels, ExpIsWithinTwoUlps) {
  const std::vector<float> x = FloatsOfEveryMagnitude(1709);
  std::vector<float> y(x.size());
  kernels_->exp_sum(y.data(), x.data(), 0.0f, x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    const double exact = std::exp(double(x[i]));
    if (y[i] == 0 && exact < 0x1.00001p-126) continue;  // subnormals become 0
    ASSERT_LE(Ulps(y[i], exact), 2) << x[i] << " gives " << y[i];
    ASSERT_GE(y[i], 0x1p-126f) << x[i];
  }
}

TEST_P(Kernels, ExpSumAddsWhatItStores) {
  for (const int64_t n : {1, 7, 16, 19, 64, 1000, 1003}) {
    const std::vector<float> x = Normal(n, 23);
    Guarded<float> src(x), dst(n);
    const float sum = kernels_->exp_sum(dst.data(), src.data(), 2.5f, n);
    double expected = 0;
    for (const float e : dst.Values()) expected += e;
    EXPECT_NEAR(sum, expected, Gamma(n) * expected);
    EXPECT_EQ(kernels_->exp_sum(nullptr, src.data(), 2.5f, n), sum) << "without dst";
  }
}

TEST_P(Kernels, ExpOfMinusInfinityIsZero) {
  const std::vector<float> x = {-kInfinity, 0.0f, -kInfinity, -200.0f, 100.0f, kInfinity, kNan};
  std::vector<float> y(x.size());
  EXPECT_EQ(kernels_->exp_sum(y.data(), x.data(), 0.0f, 4), 1.0f);
  EXPECT_EQ((std::vector<float>{y.begin(), y.begin() + 4}), (std::vector<float>{0, 1, 0, 0}));
  kernels_->exp_sum(y.data(), x.data(), 0.0f, x.size());
  EXPECT_EQ(y[4], kInfinity);
  EXPECT_EQ(y[5], kInfinity);
  EXPECT_TRUE(std::isnan(y[6]));
}

double GeluTanh(double z) {
  return 0.5 * z * (1 + std::tanh(std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z)));
}

TEST_P(Kernels, GeluIsAccurateRelativeToItsInput) {
  const std::vector<float> z = FloatsOfEveryMagnitude(1709), up(z.size(), 3.0f);
  std::vector<float> y(z.size());
  kernels_->gelu_mul(y.data(), z.data(), up.data(), z.size());
  for (size_t i = 0; i < z.size(); ++i) {
    if (std::isinf(z[i]) || std::fabs(z[i]) > 1e38f) continue;
    // Eight roundings, each at most of |z|; half of the smallest subnormal where that is more.
    const double bound = 3 * (8 * kRoundoff * std::fabs(z[i]) + 0x1p-149);
    ASSERT_NEAR(y[i], 3 * GeluTanh(z[i]), bound) << z[i];
  }
}

TEST_P(Kernels, GeluHasTheLimitsOfItsFormula) {
  const std::vector<float> z = {0.0f, -0.0f, kInfinity, 1e30f, -1e30f, kNan};
  const std::vector<float> up(z.size(), 1.0f);
  std::vector<float> y(z.size());
  kernels_->gelu_mul(y.data(), z.data(), up.data(), z.size());
  EXPECT_EQ(y[0], 0.0f);
  EXPECT_TRUE(std::signbit(y[1]));
  EXPECT_EQ(y[2], kInfinity);
  EXPECT_EQ(y[3], 1e30f);
  EXPECT_EQ(y[4], 0.0f);
  EXPECT_TRUE(std::isnan(y[5]));
}

TEST_P(Kernels, MaxFindsTheLargestAnywhere) {
  for (int64_t n = 1; n <= 67; ++n) {
    for (int64_t at = 0; at < n; ++at) {
      std::vector<float> x(n, -5.0f);
      x[at] = -4.0f;
      Guarded<float> guarded(x);
      ASSERT_EQ(kernels_->max(guarded.data(), n), -4.0f) << n << " at " << at;
    }
  }
}

TEST_P(Kernels, MaxIgnoresNan) {
  for (int64_t n = 1; n <= 67; ++n) {
    std::vector<float> x(n, kNan);
    EXPECT_EQ(kernels_->max(x.data(), n), -kInfinity);
    x[n / 2] = -3.0f;
    EXPECT_EQ(kernels_->max(x.data(), n), -3.0f);
  }
  const std::vector<float> masked(40, -kInfinity);
  EXPECT_EQ(kernels_->max(masked.data(), 40), -kInfinity);
}

}  // namespace
}  // namespace gemloupe
