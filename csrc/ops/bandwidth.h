#ifndef GEMLOUPE_OPS_BANDWIDTH_H_
#define GEMLOUPE_OPS_BANDWIDTH_H_

#include "base/status.h"

namespace gemloupe {

// Bytes per second that `threads` threads read from memory: the best of three passes over 512 MiB.
StatusOr<double> MeasureReadBandwidth(int threads);

}  // namespace gemloupe

#endif  // GEMLOUPE_OPS_BANDWIDTH_H_
