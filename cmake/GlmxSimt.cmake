# libglmx_simt: every GPU kernel compiled by g++ for the CPU that plays GPU (csrc/gpu/gx/simt.h). For tests, never in a wheel.
# AVX2 and FMA: an fma() that is a call to libm would make the GEMMs of the tests ten times as slow. Contraction stays off.
option(GLMX_SIMT "Build libglmx_simt, the GPU kernels on a CPU" OFF)
set(GLMX_SIMT_OUT "${GLMX_OUT}" CACHE PATH "Where libglmx_simt goes")
set(GLMX_SIMT_SOURCES ${PROJECT_SOURCE_DIR}/csrc/gpu/gx/simt.cpp ${PROJECT_SOURCE_DIR}/csrc/gpu/gx/simt_fragments.cpp
  ${PROJECT_SOURCE_DIR}/csrc/gpu/gx/hopper_simt.cpp)

# warp: the width of a warp that the target plays, 32 (NVIDIA) or 64 (AMD).
function(glmx_simt_options target warp)
  glmx_compile_options(${target})
  target_compile_definitions(${target} PRIVATE GX_SIMT GX_SIMT_WARP=${warp})
  target_compile_options(${target} PRIVATE -mavx2 -mfma -Wno-unknown-pragmas)
  set_target_properties(${target} PROPERTIES CXX_VISIBILITY_PRESET hidden)
endfunction()

# Each kernel file is included by a C++ file: to CMake the .cu itself stays a CUDA or HIP source.
function(glmx_simt_library target core warp)
  file(GLOB kernels CONFIGURE_DEPENDS RELATIVE ${PROJECT_SOURCE_DIR}/csrc ${PROJECT_SOURCE_DIR}/csrc/gpu/*.cu ${PROJECT_SOURCE_DIR}/csrc/gpu/sm90/*.cu)
  set(sources "")
  foreach(kernel ${kernels})
    string(REPLACE "/" "_" name ${kernel})
    file(CONFIGURE OUTPUT ${CMAKE_BINARY_DIR}/simt/${name}.cpp CONTENT "#include \"${kernel}\"\n")
    list(APPEND sources ${CMAKE_BINARY_DIR}/simt/${name}.cpp)
  endforeach()
  add_library(${target} SHARED ${sources} ${GLMX_SIMT_SOURCES})
  glmx_simt_options(${target} ${warp})
  target_link_libraries(${target} PRIVATE ${core})
  target_link_options(${target} PRIVATE -Wl,--no-undefined)
  set_target_properties(${target} PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${GLMX_SIMT_OUT} BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "$ORIGIN")
endfunction()

if(GLMX_SIMT)
  glmx_simt_library(glmx_simt glmx_core 32)
endif()
