# TensorRT's headers and library, as its packages install them or under TENSORRT_ROOT (include/ and lib/), with CUDA's
# runtime library, which is also looked for under CUDAToolkit_ROOT. Defines TensorRT::TensorRT.

# as cached paths, what the command line gives is relative to where cmake was called
set(TENSORRT_ROOT "" CACHE PATH "A folder with TensorRT's include/ and lib/")
set(CUDAToolkit_ROOT "" CACHE PATH "A folder with CUDA's include/ and lib64/")
find_path(TensorRT_INCLUDE_DIR NvInferRuntime.h HINTS ${TENSORRT_ROOT} ENV TENSORRT_ROOT PATH_SUFFIXES include)
find_library(TensorRT_LIBRARY nvinfer HINTS ${TENSORRT_ROOT} ENV TENSORRT_ROOT PATH_SUFFIXES lib)
set(cuda_places HINTS ${CUDAToolkit_ROOT} ENV CUDAToolkit_ROOT ENV CUDA_PATH PATHS /usr/local/cuda)
find_path(TensorRT_CUDA_INCLUDE_DIR cuda_runtime_api.h ${cuda_places} PATH_SUFFIXES include)
# in a Python package the library has only its full name
find_library(TensorRT_CUDART_LIBRARY NAMES cudart libcudart.so.13 libcudart.so.12 libcudart.so.11.0 ${cuda_places}
  PATH_SUFFIXES lib64 lib)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(TensorRT
  REQUIRED_VARS TensorRT_LIBRARY TensorRT_INCLUDE_DIR TensorRT_CUDART_LIBRARY TensorRT_CUDA_INCLUDE_DIR
  REASON_FAILURE_MESSAGE "to build with it, set TENSORRT_ROOT and CUDAToolkit_ROOT")

if(TensorRT_FOUND AND NOT TARGET TensorRT::TensorRT)
  add_library(TensorRT::TensorRT UNKNOWN IMPORTED)
  set_target_properties(TensorRT::TensorRT PROPERTIES
    IMPORTED_LOCATION ${TensorRT_LIBRARY}
    INTERFACE_LINK_LIBRARIES ${TensorRT_CUDART_LIBRARY}
    INTERFACE_INCLUDE_DIRECTORIES "${TensorRT_INCLUDE_DIR};${TensorRT_CUDA_INCLUDE_DIR}")
endif()
mark_as_advanced(TensorRT_INCLUDE_DIR TensorRT_LIBRARY TensorRT_CUDA_INCLUDE_DIR TensorRT_CUDART_LIBRARY)
