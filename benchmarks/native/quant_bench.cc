// Products with quantised weights: the share of the read bandwidth with 1 to 8 rows (decode), and
// operations per second with many rows (prefill) beside oneDNN's matmul of the same shape, all in one
// run. Then products with float32 weights beside oneDNN's, whose weights are packed beforehand.
// Usage: gemloupe_quant_bench [threads [n [k [rows]]]], by default 2 12288 1536 512.

#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dnnl.hpp>
#include <functional>
#include <random>
#include <vector>

#include "base/cpu.h"
#include "base/memory.h"
#include "base/thread_pool.h"
#include "ops/bandwidth.h"
#include "ops/convert.h"
#include "ops/dispatch.h"
#include "ops/linear.h"

namespace gemloupe {
namespace {

double MedianSeconds(int rounds, const std::function<void()>& work) {
  std::vector<double> seconds;
  for (int i = 0; i < rounds; ++i) {
    const auto start = std::chrono::steady_clock::now();
    work();
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    seconds.push_back(taken.count());
  }
  std::nth_element(seconds.begin(), seconds.begin() + seconds.size() / 2, seconds.end());
  return seconds[seconds.size() / 2];
}

void FillFinite(AlignedBuffer& buffer) {
  // 0x2c2c is the float16 0.065: scales stay finite, and integers vary enough.
  std::memset(buffer.data(), 0x2c, buffer.size());
}

// oneDNN's own product [rows, k] · [n, k]ᵀ on `threads` OpenMP threads, weights in its own layout.
double OnednnSeconds(dnnl::memory::data_type src_type, dnnl::memory::data_type weight_type,
                     dnnl::memory::data_type dst_type, int threads, int64_t rows, int64_t n,
                     int64_t k) {
  using dnnl::memory;
  omp_set_num_threads(threads);
  const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  dnnl::stream stream(engine);
  const memory::desc src({rows, k}, src_type, memory::format_tag::ab);
  const memory::desc any({k, n}, weight_type, memory::format_tag::any);
  const memory::desc dst({rows, n}, dst_type, memory::format_tag::ab);
  const dnnl::matmul::primitive_desc desc(engine, src, any, dst);
  memory a(src, engine), b(desc.weights_desc(), engine), c(dst, engine);
  std::memset(a.get_data_handle(), 1, src.get_size());
  std::memset(b.get_data_handle(), 1, desc.weights_desc().get_size());
  dnnl::matmul matmul(desc);
  const auto run = [&] {
    matmul.execute(stream, {{DNNL_ARG_SRC, a}, {DNNL_ARG_WEIGHTS, b}, {DNNL_ARG_DST, c}});
    stream.wait();
  };
  run();
  const double seconds = MedianSeconds(5, run);
  omp_set_num_threads(1);
  return seconds;
}

int Main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 2;
  const int64_t n = argc > 2 ? std::atoll(argv[2]) : 12288;
  const int64_t k = argc > 3 ? std::atoll(argv[3]) : 1536;
  const int64_t many = argc > 4 ? std::atoll(argv[4]) : 512;
  if (threads < 1 || n < 16 || k < 64 || many < 9 || !InitDispatch().ok()) {
    std::fprintf(stderr, "usage: %s [threads [n [k [rows]]]]\n", argv[0]);
    return 2;
  }
  std::printf("%s, %s kernels, %d thread(s), n %lld, k %lld\n", CpuModelName().c_str(),
              QuantKernelsInUse().name, threads, static_cast<long long>(n),
              static_cast<long long>(k));
  Arena arena;
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(many * k));
  for (float& value : x) value = normal(generator);
  std::vector<float> y(static_cast<size_t>(many * n));
  const DType dtypes[] = {DType::kInt4, DType::kInt6, DType::kInt8, DType::kInt4K, DType::kInt6K};
  const char* only = std::getenv("ONLY");
  for (const DType dtype : dtypes) {
    if (k % 256 != 0 && dtype >= DType::kInt4K) continue;
    if (only != nullptr && std::strcmp(only, DTypeName(dtype)) != 0) continue;
    // As many matrices as no cache holds, read in turn.
    const int64_t matrices =
        std::max<int64_t>(1, (int64_t{3} << 30) / static_cast<int64_t>(MatrixBytes(dtype, n, k)));
    AlignedBuffer weights(static_cast<size_t>(matrices) * MatrixBytes(dtype, n, k));
    FillFinite(weights);
    int64_t next = 0;
    const auto product = [&](int64_t rows, const MatmulPath& path) {
      const TensorView weight = {
          weights.data() + static_cast<size_t>(next++ % matrices) * MatrixBytes(dtype, n, k),
          dtype,
          {n, k}};
      if (!Linear(ConstMatrix(x.data(), rows, k), {{&weight, Matrix(y.data(), rows, n)}}, path,
                  arena)
               .ok()) {
        std::abort();
      }
    };
    const ThreadPool::Pass pass(threads);  // as a model's: its threads stay awake between products
    for (const int64_t rows : {1, 2, 4, 8}) {
      const double read = MeasureReadBandwidth(threads).value_or(0);
      product(rows, {});
      const double rate = static_cast<double>(MatrixBytes(dtype, n, k)) /
                          MedianSeconds(static_cast<int>(std::min<int64_t>(matrices, 100)),
                                        [&] { product(rows, {}); });
      std::printf("%-7s %4lld rows  %6.2f GB/s  %3.0f %% of %5.2f GB/s read\n", DTypeName(dtype),
                  static_cast<long long>(rows), rate * 1e-9, 100 * rate / read, read * 1e-9);
    }
    for (const int64_t rows : {int64_t{32}, int64_t{128}, many}) {
      for (const bool exact : {true, false}) {
        const MatmulPath path = {.row_exact = exact, .bfloat16 = true};
        const double seconds = MedianSeconds(5, [&] { product(rows, path); });
        std::printf(
            "%-7s %4lld rows  %7.1f Gop/s%s\n", DTypeName(dtype), static_cast<long long>(rows),
            2e-9 * static_cast<double>(rows * n * k) / seconds, exact ? " (row-exact)" : "");
      }
    }
  }
  using Type = dnnl::memory::data_type;
  const double ops = 2e-9 * static_cast<double>(many * n * k);
  const struct {
    const char* name;
    Type src, weight, dst;
  } peers[] = {{"u8s8", Type::u8, Type::s8, Type::s32},
               {"bf16", Type::bf16, Type::bf16, Type::f32},
               {"f32", Type::f32, Type::f32, Type::f32}};
  for (const auto& peer : peers) {
    std::printf("oneDNN %-4s %4lld rows  %7.1f Gop/s\n", peer.name, static_cast<long long>(many),
                ops / OnednnSeconds(peer.src, peer.weight, peer.dst, threads, many, n, k));
  }
  // Whole products of float32, by turns with oneDNN's.
  AlignedBuffer floats(MatrixBytes(DType::kFloat32, n, k));
  FillFinite(floats);
  const TensorView weight = {floats.data(), DType::kFloat32, {n, k}};
  for (const int64_t rows : {int64_t{128}, many}) {
    std::vector<double> ours, theirs;
    for (int round = 0; round < 5; ++round) {
      const ThreadPool::Pass pass(threads);
      ours.push_back(MedianSeconds(3, [&] {
        if (!Linear(ConstMatrix(x.data(), rows, k), {{&weight, Matrix(y.data(), rows, n)}}, {},
                    arena)
                 .ok()) {
          std::abort();
        }
      }));
      theirs.push_back(OnednnSeconds(Type::f32, Type::f32, Type::f32, threads, rows, n, k));
    }
    const double least = *std::min_element(ours.begin(), ours.end());
    const double peer = *std::min_element(theirs.begin(), theirs.end());
    const double work = 2e-9 * static_cast<double>(rows * n * k);
    std::printf("float32 %4lld rows  %7.1f Gop/s  %.2f of oneDNN's %7.1f Gop/s\n",
                static_cast<long long>(rows), work / least, peer / least, work / peer);
  }
  return 0;
}

}  // namespace
}  // namespace gemloupe

int main(int argc, char** argv) { return gemloupe::Main(argc, argv); }
