# libglmx_simt: every GPU kernel compiled by g++ for the CPU that plays GPU (csrc/gpu/gx/simt.h). For tests, never in a wheel.
# AVX2 and FMA: an fma() that is a call to libm would make the GEMMs of the tests ten times as slow. Contraction stays off.
option(GLMX_SIMT "Build libglmx_simt, the GPU kernels on a CPU" OFF)
set(GLMX_SIMT_SOURCES ${PROJECT_SOURCE_DIR}/csrc/gpu/gx/simt.cpp ${PROJECT_SOURCE_DIR}/csrc/gpu/gx/simt_fragments.cpp
  ${PROJECT_SOURCE_DIR}/csrc/gpu/gx/hopper_simt.cpp)
set(GLMX_SIMT_WARP 32 CACHE STRING "Width of a warp that libglmx_simt plays: 32 or 64")

function(glmx_simt_options target)
  glmx_compile_options(${target})
  target_compile_definitions(${target} PRIVATE GX_SIMT GX_SIMT_WARP=${GLMX_SIMT_WARP})
  target_compile_options(${target} PRIVATE -mavx2 -mfma -Wno-unknown-pragmas)
  set_target_properties(${target} PROPERTIES CXX_VISIBILITY_PRESET hidden)
endfunction()

function(glmx_simt_library target core)
  file(GLOB kernels CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/gpu/*.cu ${PROJECT_SOURCE_DIR}/csrc/gpu/sm90/*.cu)
  set_source_files_properties(${kernels} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-xc++")
  add_library(${target} SHARED ${kernels} ${GLMX_SIMT_SOURCES})
  glmx_simt_options(${target})
  target_link_libraries(${target} PRIVATE ${core})
  target_link_options(${target} PRIVATE -Wl,--no-undefined)
  set_target_properties(${target} PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${GLMX_OUT} BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "$ORIGIN")
endfunction()

if(GLMX_SIMT)
  glmx_simt_library(glmx_simt glmx_core)
endif()
