# The op library (torch's stable ABI: one binary for torch 2.11 and later) and the Python module (pybind11). Both link the core.
if(NOT EXISTS "${GLMX_TORCH_DIR}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR "GLMX_TORCH_DIR='${GLMX_TORCH_DIR}' has no include/torch/csrc/stable/library.h. Install torch >= 2.11 first: pip install torch==2.13.0")
endif()

function(glmx_torch_library target core)
  file(GLOB sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/torch/*.cpp)
  add_library(${target} SHARED ${sources})
  glmx_compile_options(${target})
  # 2.11: what the stable shim of that release exports is all that is used, so every later torch loads the same file.
  target_compile_definitions(${target} PRIVATE TORCH_TARGET_VERSION=0x020B000000000000)
  target_include_directories(${target} SYSTEM PRIVATE ${GLMX_TORCH_DIR}/include)
  target_link_directories(${target} PRIVATE ${GLMX_TORCH_DIR}/lib)
  target_link_libraries(${target} PRIVATE ${core} torch_cpu c10 ${CMAKE_DL_LIBS})
  target_link_options(${target} PRIVATE -Wl,--no-undefined -Wl,--exclude-libs,ALL)
  set_target_properties(${target} PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${GLMX_OUT} CXX_VISIBILITY_PRESET hidden
    BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "$ORIGIN")
endfunction()

function(glmx_native_module name core)
  find_package(Python 3.11 REQUIRED COMPONENTS Interpreter Development.Module)
  find_package(pybind11 CONFIG REQUIRED)
  pybind11_add_module(${name} MODULE ${PROJECT_SOURCE_DIR}/csrc/native/module.cpp)
  glmx_compile_options(${name})
  target_compile_definitions(${name} PRIVATE GLMX_VERSION="${PROJECT_VERSION}" GLMX_BUILD_TYPE="${CMAKE_BUILD_TYPE}"
    GLMX_COMPILER="${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}"
    GLMX_CUDA_VERSION="${GLMX_CUDA_VERSION}" GLMX_HIP_VERSION="${GLMX_HIP_VERSION}")
  target_link_libraries(${name} PRIVATE ${core} ${CMAKE_DL_LIBS})
  set_target_properties(${name} PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${GLMX_OUT} BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "$ORIGIN")
endfunction()
