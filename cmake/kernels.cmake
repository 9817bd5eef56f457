# The hand-written kernels: csrc/kernels/simd_*.cc is compiled once per instruction set, each time
# into the namespace that GEMLOUPE_KERNEL_ISA names.
add_library(gemloupe_kernels INTERFACE)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  file(GLOB simd_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/kernels/simd_*.cc)
  set(flags_avx2 -mavx2 -mfma -mf16c)
  set(flags_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c
                   -mprefer-vector-width=512)
  # GCC 12 reports its own _mm512_undefined_* as uninitialised (GCC bug 105593).
  set(warnings -Wall -Wextra -Wno-uninitialized)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    list(APPEND warnings -Wno-maybe-uninitialized)
  endif()
  set(optimize -O3 -fno-exceptions)
  if(GEMLOUPE_SANITIZE)
    # -O3 with checks takes minutes to compile.
    set(optimize -O1 -g -fno-exceptions -fno-omit-frame-pointer -fsanitize=${GEMLOUPE_SANITIZE}
                 -fno-sanitize-recover=all)
  endif()
  set(sources_avx2 ${simd_sources} ${PROJECT_SOURCE_DIR}/csrc/kernels/quant_avx2.cc)
  set(sources_avx512 ${simd_sources})
  set(flags_avx512_vnni ${flags_avx512} -mavx512vnni)
  set(sources_avx512_vnni ${PROJECT_SOURCE_DIR}/csrc/kernels/quant_vnni.cc)
  set(flags_amx ${flags_avx512_vnni} -mamx-tile -mamx-int8)
  set(sources_amx ${PROJECT_SOURCE_DIR}/csrc/kernels/quant_amx.cc)
  foreach(isa avx2 avx512 avx512_vnni amx)
    add_library(gemloupe_kernels_${isa} OBJECT ${sources_${isa}})
    target_include_directories(gemloupe_kernels_${isa} PRIVATE ${PROJECT_SOURCE_DIR}/csrc)
    target_compile_definitions(gemloupe_kernels_${isa} PRIVATE GEMLOUPE_KERNEL_ISA=${isa}
                               GEMLOUPE_KERNEL_ISA_${isa}=1)
    target_compile_options(gemloupe_kernels_${isa} PRIVATE ${flags_${isa}} ${warnings}
                           -ffp-contract=off ${optimize})
    target_sources(gemloupe_kernels INTERFACE $<TARGET_OBJECTS:gemloupe_kernels_${isa}>)
  endforeach()
endif()
