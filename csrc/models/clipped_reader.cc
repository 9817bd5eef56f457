#include "models/clipped_reader.h"

#include <cmath>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "models/weight_names.h"

namespace gemloupe {

StatusOr<ClippedLinear> ReadClipped(const ClippedSource& source, bool clipped,
                                    WeightStore& weights) {
  const names::Clipped stored = names::OfClipped(source.matrix);
  ClippedLinear linear;
  linear.module = source.module;
  GL_ASSIGN_OR_RETURN(linear.weight, weights.Take(stored.weight, {source.rows, source.cols}));
  if (!clipped) return linear;
  for (const auto& [name, bound] : {std::pair{&stored.input_min, &linear.input.low},
                                    std::pair{&stored.input_max, &linear.input.high},
                                    std::pair{&stored.output_min, &linear.output.low},
                                    std::pair{&stored.output_max, &linear.output.high}}) {
    GL_ASSIGN_OR_RETURN(const std::vector<float> value, weights.ReadRows(*name, {0}));
    if (std::isnan(value.at(0))) {
      return absl::InvalidArgumentError(
          absl::StrCat("tensor ", *name, " is nan, expected a bound"));
    }
    *bound = value.at(0);
  }
  return linear;
}

}  // namespace gemloupe
