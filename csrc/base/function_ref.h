#ifndef GEMLOUPE_BASE_FUNCTION_REF_H_
#define GEMLOUPE_BASE_FUNCTION_REF_H_

#include <type_traits>
#include <utility>

namespace gemloupe {

template <typename Signature>
class FunctionRef;

// Refers to a callable that outlives the call: no copy and no allocation, unlike std::function.
template <typename R, typename... Args>
class FunctionRef<R(Args...)> {
 public:
  template <typename F, typename = std::enable_if_t<!std::is_same_v<std::decay_t<F>, FunctionRef>>>
  FunctionRef(F&& f)  // NOLINT(google-explicit-constructor): passed where a lambda is written
      : object_(const_cast<void*>(static_cast<const void*>(&f))),
        call_([](void* object, Args... args) -> R {
          return (*static_cast<std::remove_reference_t<F>*>(object))(std::forward<Args>(args)...);
        }) {}

  R operator()(Args... args) const { return call_(object_, std::forward<Args>(args)...); }

 private:
  void* object_;
  R (*call_)(void*, Args...);
};

}  // namespace gemloupe

#endif  // GEMLOUPE_BASE_FUNCTION_REF_H_
