#include "ops/onednn.h"

#include <omp.h>

#include <array>
#include <new>
#include <unordered_map>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "base/cpu.h"
#include "base/memory.h"
#include "dnnl.hpp"

namespace gemloupe {
namespace {

// Primitives kept per thread: a model has about ten matrix shapes, each with a few row counts.
constexpr size_t kMaxCachedPrimitives = 128;

// One OpenMP thread while it lives. The setting belongs to the calling thread; it is restored so that
// torch and NumPy, which may share the OpenMP library, keep theirs.
class OneOpenMpThread {
 public:
  OneOpenMpThread() : before_(omp_get_max_threads()) { omp_set_num_threads(1); }
  ~OneOpenMpThread() { omp_set_num_threads(before_); }
  OneOpenMpThread(const OneOpenMpThread&) = delete;
  OneOpenMpThread& operator=(const OneOpenMpThread&) = delete;

 private:
  int before_;
};

// Lets GEMLOUPE_ISA bind oneDNN too. oneDNN accepts this once, before its first primitive.
Status CapIsa() {
  GL_ASSIGN_OR_RETURN(const Isa isa, SelectedIsa());
  if (isa == DetectedIsa()) return absl::OkStatus();
  dnnl::cpu_isa cap;
  switch (isa) {
    case Isa::kPortable:
      return absl::FailedPreconditionError(
          "oneDNN has no portable code; with GEMLOUPE_ISA=portable it must not be called");
    case Isa::kAvx2: cap = dnnl::cpu_isa::avx2; break;
    case Isa::kAvx512: cap = dnnl::cpu_isa::avx512_core; break;
    case Isa::kAvx512Vnni: cap = dnnl::cpu_isa::avx512_core_vnni; break;
    case Isa::kAvx512Bf16: cap = dnnl::cpu_isa::avx512_core_bf16; break;
    default: return absl::OkStatus();
  }
  if (dnnl::set_max_cpu_isa(cap) != dnnl::status::success) {
    return absl::FailedPreconditionError(
        absl::StrCat("oneDNN can't be limited to ", IsaName(isa),
                     ": it was used in this process before, or was built without this control"));
  }
  return absl::OkStatus();
}

Status Prepare() {
  static const Status* status = new Status(CapIsa());
  return *status;
}

const dnnl::engine& Engine() {
  // Never destroyed: threads can still compute while the process exits.
  static const auto* engine = new dnnl::engine(dnnl::engine::kind::cpu, 0);
  return *engine;
}

struct MatmulKey {
  // m, n, k, then the strides of src, of the right side along k and n, and of dst.
  std::array<int64_t, 7> sizes;
  dnnl::memory::data_type dtype;

  bool operator==(const MatmulKey& other) const {
    return sizes == other.sizes && dtype == other.dtype;
  }
  template <typename H>
  friend H AbslHashValue(H h, const MatmulKey& key) {
    return H::combine(std::move(h), key.sizes, static_cast<int>(key.dtype));
  }
};

struct CachedMatmul {
  dnnl::primitive primitive;
  dnnl::memory src, weight, dst, scratch;
  std::unordered_map<int, dnnl::memory> arguments;
  size_t scratch_bytes = 0;
  uint64_t last_use = 0;
};

CachedMatmul MakeMatmul(const MatmulKey& key) {
  const auto [m, n, k, src_stride, k_stride, n_stride, dst_stride] = key.sizes;
  using Desc = dnnl::memory::desc;
  const Desc src({m, k}, key.dtype, dnnl::memory::dims{src_stride, 1});
  const Desc weight({k, n}, key.dtype, dnnl::memory::dims{k_stride, n_stride});
  const Desc dst({m, n}, dnnl::memory::data_type::f32, dnnl::memory::dims{dst_stride, 1});
  dnnl::primitive_attr attr;
  attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  const dnnl::matmul::primitive_desc desc(Engine(), src, weight, dst, attr);

  CachedMatmul made;
  made.primitive = dnnl::matmul(desc);
  made.scratch_bytes = desc.scratchpad_desc().get_size();
  // The memory objects share their handles with the copies in `arguments`.
  made.src = dnnl::memory(src, Engine(), nullptr);
  made.weight = dnnl::memory(weight, Engine(), nullptr);
  made.dst = dnnl::memory(dst, Engine(), nullptr);
  made.scratch = dnnl::memory(desc.scratchpad_desc(), Engine(), nullptr);
  made.arguments = {{DNNL_ARG_SRC, made.src},
                    {DNNL_ARG_WEIGHTS, made.weight},
                    {DNNL_ARG_DST, made.dst},
                    {DNNL_ARG_SCRATCHPAD, made.scratch}};
  return made;
}

// What one thread keeps between calls.
class ThreadContext {
 public:
  static ThreadContext& Get() {
    thread_local ThreadContext context;
    return context;
  }

  void Matmul(const MatmulKey& key, const void* src, const void* weight, float* dst) {
    CachedMatmul& matmul = Find(key);
    if (scratch_.size() < matmul.scratch_bytes) scratch_ = AlignedBuffer(matmul.scratch_bytes);
    matmul.src.set_data_handle(const_cast<void*>(src));
    matmul.weight.set_data_handle(const_cast<void*>(weight));
    matmul.dst.set_data_handle(dst);
    matmul.scratch.set_data_handle(scratch_.data());
    matmul.primitive.execute(stream_, matmul.arguments);
    stream_.wait();
  }

 private:
  CachedMatmul& Find(const MatmulKey& key) {
    auto found = matmuls_.find(key);
    if (found == matmuls_.end()) {
      if (matmuls_.size() >= kMaxCachedPrimitives) {
        auto oldest = matmuls_.begin();
        for (auto it = matmuls_.begin(); it != matmuls_.end(); ++it) {
          if (it->second.last_use < oldest->second.last_use) oldest = it;
        }
        matmuls_.erase(oldest);
      }
      found = matmuls_.emplace(key, MakeMatmul(key)).first;
    }
    found->second.last_use = ++uses_;
    return found->second;
  }

  dnnl::stream stream_{Engine()};
  AlignedBuffer scratch_;
  absl::flat_hash_map<MatmulKey, CachedMatmul> matmuls_;
  uint64_t uses_ = 0;
};

// A single row has no stride; give it the plain one, so that fewer primitives are made.
template <typename M>
int64_t Stride(const M& matrix) {
  return matrix.rows == 1 ? matrix.cols : matrix.stride;
}

// The right side [k, n] lies at `right` with the given strides.
template <typename T>
Status Matmul(MatrixView<const T> src, const T* right, int64_t k_stride, int64_t n_stride,
              Matrix dst, dnnl::memory::data_type dtype) {
  if (dst.rows == 0 || dst.cols == 0) return absl::OkStatus();
  GL_CHECK(src.cols > 0);
  GL_RETURN_IF_ERROR(Prepare());
  const MatmulKey key{{dst.rows, dst.cols, src.cols, Stride(src), k_stride, n_stride, Stride(dst)},
                      dtype};
  const OneOpenMpThread one_thread;
  try {
    ThreadContext::Get().Matmul(key, src.data, right, dst.data);
  } catch (const dnnl::error& error) {
    const std::string message = absl::StrCat("oneDNN matmul of ", dst.rows, " x ", dst.cols, " x ",
                                             src.cols, ": ", error.what());
    switch (error.status) {
      case dnnl_out_of_memory: return absl::ResourceExhaustedError(message);
      case dnnl_unimplemented: return absl::UnimplementedError(message);
      default: return absl::InternalError(message);
    }
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError("oneDNN matmul: no memory for its scratchpad");
  }
  return absl::OkStatus();
}

}  // namespace

Status OnednnMatmulF32(ConstMatrix src, ConstMatrix weight, Matrix dst) {
  GL_CHECK(src.rows == dst.rows && weight.rows == dst.cols && src.cols == weight.cols);
  return Matmul<float>(src, weight.data, 1, Stride(weight), dst, dnnl::memory::data_type::f32);
}

Status OnednnMatmulColumnsF32(ConstMatrix src, ConstMatrix right, Matrix dst) {
  GL_CHECK(src.rows == dst.rows && right.cols == dst.cols && src.cols == right.rows);
  return Matmul<float>(src, right.data, Stride(right), 1, dst, dnnl::memory::data_type::f32);
}

Status OnednnMatmulBf16(MatrixView<const uint16_t> src, MatrixView<const uint16_t> weight,
                        Matrix dst) {
  GL_CHECK(src.rows == dst.rows && weight.rows == dst.cols && src.cols == weight.cols);
  return Matmul<uint16_t>(src, weight.data, 1, Stride(weight), dst, dnnl::memory::data_type::bf16);
}

std::string OnednnVersion() {
  const dnnl_version_t* version = dnnl_version();
  return absl::StrCat(version->major, ".", version->minor, ".", version->patch, " (", version->hash,
                      ")");
}

}  // namespace gemloupe
