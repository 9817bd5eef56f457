#ifndef GEMLOUPE_MODELS_CLIPPED_READER_H_
#define GEMLOUPE_MODELS_CLIPPED_READER_H_

#include <cstdint>
#include <string>

#include "base/status.h"
#include "formats/weight_store.h"
#include "layers/clipped_linear.h"

namespace gemloupe {

// Reads a tower's matrix [rows, cols], and its bounds where `clipped`; `matrix` is its name as the
// decoder would have it ("….weight").
StatusOr<ClippedLinear> ReadClipped(const std::string& matrix, int64_t rows, int64_t cols,
                                    bool clipped, WeightStore& weights);

}  // namespace gemloupe

#endif  // GEMLOUPE_MODELS_CLIPPED_READER_H_
