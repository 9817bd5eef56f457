#ifndef GEMLOUPE_MODELS_CLIPPED_READER_H_
#define GEMLOUPE_MODELS_CLIPPED_READER_H_

#include <cstdint>
#include <string>

#include "base/status.h"
#include "formats/weight_store.h"
#include "layers/clipped_linear.h"

namespace gemloupe {

// A tower's matrix [rows, cols]; `matrix` is its name as the decoder would have it ("….weight").
struct ClippedSource {
  AdaptedModule module;
  std::string matrix;
  int64_t rows;
  int64_t cols;
};

// Reads a matrix, and its bounds where `clipped`.
StatusOr<ClippedLinear> ReadClipped(const ClippedSource& source, bool clipped,
                                    WeightStore& weights);

}  // namespace gemloupe

#endif  // GEMLOUPE_MODELS_CLIPPED_READER_H_
