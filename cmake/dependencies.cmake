# oneDNN ≥ 3.2, Abseil and OpenMP's run time.
find_package(Threads REQUIRED)
find_package(OpenMP REQUIRED COMPONENTS CXX)

# oneDNN: -Ddnnl_ROOT=... wins; else the Python package that pyproject.toml asks for. Under pip's
# build isolation it lies in a folder that only that Python's package metadata names.
if(NOT dnnl_ROOT AND NOT DEFINED ENV{dnnl_ROOT})
  find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "
from importlib.metadata import distribution
package = distribution('onednn-devel-cpu-gomp')
config = next(file for file in package.files if file.name == 'dnnl-config.cmake')
print(package.locate_file(config).resolve().parent.as_posix())"
    OUTPUT_VARIABLE dnnl_folder OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  if(dnnl_folder)
    set(dnnl_DIR ${dnnl_folder} CACHE PATH "Folder of dnnl-config.cmake" FORCE)
  endif()
endif()
find_package(dnnl 3.2 CONFIG)
if(NOT dnnl_FOUND)
  message(FATAL_ERROR "gemloupe needs oneDNN >= 3.2: run 'pip install onednn-devel-cpu-gomp==2023.2.0' "
                      "in the Python environment of the build, or pass -Ddnnl_ROOT=<prefix>.")
endif()

# Abseil: the system's shared libraries, else its sources at a pinned tag.
set(absl_repository https://github.com/abseil/abseil-cpp.git)
set(absl_tag 20240722.0)
find_package(absl CONFIG QUIET)
if(NOT absl_FOUND)
  # Asked for first: FetchContent's own error would not say what to install.
  find_package(Git QUIET)
  if(GIT_FOUND AND NOT FETCHCONTENT_SOURCE_DIR_ABSL)
    execute_process(COMMAND ${GIT_EXECUTABLE} ls-remote --exit-code ${absl_repository} ${absl_tag}
                    TIMEOUT 30 RESULT_VARIABLE absl_unreachable OUTPUT_QUIET ERROR_QUIET)
  endif()
  if(NOT FETCHCONTENT_SOURCE_DIR_ABSL AND (NOT GIT_FOUND OR absl_unreachable))
    message(FATAL_ERROR "gemloupe needs Abseil, which is not installed, and its sources can't be "
                        "fetched from ${absl_repository}. On Debian and Ubuntu run: "
                        "apt-get install libabsl-dev")
  endif()
  message(STATUS "No Abseil found ('apt-get install libabsl-dev' provides it): fetching ${absl_tag}")
  include(FetchContent)
  set(ABSL_PROPAGATE_CXX_STD ON)
  set(ABSL_ENABLE_INSTALL OFF)
  FetchContent_Declare(absl GIT_REPOSITORY ${absl_repository} GIT_TAG ${absl_tag} GIT_SHALLOW TRUE)
  FetchContent_MakeAvailable(absl)
endif()
set(GEMLOUPE_ABSL absl::status absl::statusor absl::strings absl::str_format absl::flat_hash_map)
