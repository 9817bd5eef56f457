#ifndef GEMLOUPE_BASE_STATUS_H_
#define GEMLOUPE_BASE_STATUS_H_

#include <cstdio>
#include <cstdlib>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace gemloupe {

using absl::Status;
using absl::StatusOr;

}  // namespace gemloupe

// Returns the status of `expr` from the enclosing function unless it is OK.
#define GL_RETURN_IF_ERROR(expr)           \
  do {                                     \
    ::absl::Status gl_status = (expr);     \
    if (!gl_status.ok()) return gl_status; \
  } while (false)

#define GL_CONCAT_INNER(a, b) a##b
#define GL_CONCAT(a, b) GL_CONCAT_INNER(a, b)

// Assigns the value of the StatusOr `expr` to `lhs`, or returns its status.
#define GL_ASSIGN_OR_RETURN(lhs, expr) \
  GL_ASSIGN_OR_RETURN_IMPL(GL_CONCAT(gl_status_or_, __LINE__), lhs, expr)
#define GL_ASSIGN_OR_RETURN_IMPL(tmp, lhs, expr) \
  auto tmp = (expr);                             \
  if (!tmp.ok()) return tmp.status();            \
  lhs = std::move(tmp).value()

// For our own mistakes only: a user's mistake is a Status, never a CHECK.
#define GL_CHECK(condition)                                                                        \
  do {                                                                                             \
    if (!(condition)) {                                                                            \
      std::fprintf(stderr, "gemloupe: %s:%d: check failed: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                                \
    }                                                                                              \
  } while (false)

#endif  // GEMLOUPE_BASE_STATUS_H_
