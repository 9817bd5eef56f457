# oneDNN ≥ 3.2, Abseil and OpenMP's run time.
find_package(Threads REQUIRED)
find_package(OpenMP REQUIRED COMPONENTS CXX)

# oneDNN: -Ddnnl_ROOT=... wins; else the PyPI package beside the Python that runs the build.
if(NOT dnnl_ROOT AND NOT DEFINED ENV{dnnl_ROOT})
  find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "import sysconfig; print(sysconfig.get_path('data'))"
    OUTPUT_VARIABLE python_prefix OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  list(APPEND CMAKE_PREFIX_PATH ${python_prefix})
endif()
find_package(dnnl 3.2 CONFIG)
if(NOT dnnl_FOUND)
  message(FATAL_ERROR "gemloupe needs oneDNN >= 3.2: run 'pip install onednn-devel-cpu-gomp==2023.2.0' "
                      "in the Python environment of the build, or pass -Ddnnl_ROOT=<prefix>.")
endif()

# Abseil: the system's shared libraries, else its sources at a pinned tag.
set(absl_tag 20240722.0)
find_package(absl CONFIG QUIET)
if(NOT absl_FOUND)
  message(STATUS "No Abseil found ('apt-get install libabsl-dev' provides it): fetching ${absl_tag}")
  include(FetchContent)
  set(ABSL_PROPAGATE_CXX_STD ON)
  set(ABSL_ENABLE_INSTALL OFF)
  FetchContent_Declare(absl GIT_REPOSITORY https://github.com/abseil/abseil-cpp.git
                       GIT_TAG ${absl_tag} GIT_SHALLOW TRUE)
  FetchContent_MakeAvailable(absl)
endif()
set(GEMLOUPE_ABSL absl::status absl::statusor absl::strings absl::str_format absl::flat_hash_map)
