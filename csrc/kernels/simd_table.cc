#include "kernels/kernel_table.h"
#include "kernels/simd_kernels.h"

#define GEMLOUPE_STRING_OF(x) #x
#define GEMLOUPE_NAME_OF(isa) GEMLOUPE_STRING_OF(isa)

namespace gemloupe::GEMLOUPE_KERNEL_ISA {

// Constant-initialised: no code of this instruction set runs before someone asks for it.
extern const KernelTable kTable;
constinit const KernelTable kTable = {
    .name = GEMLOUPE_NAME_OF(GEMLOUPE_KERNEL_ISA),
    .matmul_f32 = MatmulF32,
    .matmul_bf16 = MatmulBf16,
    .matmul_f16 = MatmulF16,
    .matmul_i8 = MatmulI8,
    .accumulate_f32 = AccumulateF32,
    .accumulate_bf16 = AccumulateBf16,
    .accumulate_f16 = AccumulateF16,
    .accumulate_i8 = AccumulateI8,
    .bf16_to_f32 = Bf16ToF32,
    .f16_to_f32 = F16ToF32,
    .f32_to_bf16 = F32ToBf16,
    .f32_to_f16 = F32ToF16,
    .i8_to_f32 = I8ToF32,
    .f32_to_i8 = F32ToI8,
    .transpose = Transpose,
    .rms_norm = RmsNorm,
    .rope = Rope,
    .gelu_mul = GeluMul,
    .add = Add,
    .scale = Scale,
    .add_scaled = AddScaled,
    .mul = Mul,
    .sigmoid_mul = SigmoidMul,
    .clamp = Clamp,
    .softcap = Softcap,
    .max = Max,
    .exp_sum = ExpSum,
};

}  // namespace gemloupe::GEMLOUPE_KERNEL_ISA
