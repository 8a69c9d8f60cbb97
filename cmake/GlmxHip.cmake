# The HIP backend (GLMX_HIP=ON): the portable kernels of csrc/gpu as objects for libglmx_core. Not measured on hardware; CI compiles it.
# CMake's own HIP language asks for a complete ROCm; this asks for a clang that knows HIP, HIP's headers and AMD's device libraries.
# GLMX_HIP_COMPILER: a clang++ that knows HIP; ROCm's own where it is not given.
set(GLMX_HIP_ARCHS "gfx90a;gfx942" CACHE STRING "AMD GPUs to compile for; waves of 64 lanes")
set(GLMX_HIP_FLAGS "" CACHE STRING "More flags for that compiler, as --rocm-path=DIR or --rocm-device-lib-path=DIR")
# One rounding for each +, *, / and sqrt, no contraction, fp32 denormals flushed: the numerics of every backend (csrc/gpu/gx/gx.h).
set(GLMX_HIP_OPTIONS -x hip -D__HIP_PLATFORM_AMD__ -std=c++20 -O3 -fPIC -Wall -Wextra -Wno-unused-function
  -ffp-contract=off -fno-fast-math -fgpu-flush-denormals-to-zero -fhip-fp32-correctly-rounded-divide-sqrt)

# Adds the kernels to the core; target glmx_hip is their objects alone.
function(glmx_hip_kernels core)
  find_program(GLMX_HIP_COMPILER NAMES amdclang++ clang++ HINTS $ENV{ROCM_PATH}/bin $ENV{ROCM_PATH}/llvm/bin /opt/rocm/bin /opt/rocm/llvm/bin)
  find_library(GLMX_HIP_RUNTIME amdhip64 HINTS $ENV{ROCM_PATH}/lib /opt/rocm/lib)
  if(NOT GLMX_HIP_COMPILER OR NOT GLMX_HIP_RUNTIME)
    message(FATAL_ERROR "GLMX_HIP=ON: expected ROCm's clang++ and libamdhip64: found '${GLMX_HIP_COMPILER}' and '${GLMX_HIP_RUNTIME}'. "
      "Set ROCM_PATH, or -DGLMX_HIP_COMPILER=")
  endif()
  separate_arguments(more NATIVE_COMMAND "${GLMX_HIP_FLAGS}")
  list(TRANSFORM GLMX_HIP_ARCHS PREPEND --offload-arch= OUTPUT_VARIABLE archs)
  file(GLOB sources CONFIGURE_DEPENDS RELATIVE ${PROJECT_SOURCE_DIR}/csrc/gpu ${PROJECT_SOURCE_DIR}/csrc/gpu/*.cu)  # sm90 is Hopper's
  set(objects "")
  foreach(source ${sources} gx/hip.cu)
    set(object ${PROJECT_BINARY_DIR}/hip/${source}.o)
    get_filename_component(folder ${object} DIRECTORY)
    file(MAKE_DIRECTORY ${folder})
    add_custom_command(OUTPUT ${object} DEPENDS ${PROJECT_SOURCE_DIR}/csrc/gpu/${source} DEPFILE ${object}.d WORKING_DIRECTORY ${folder}
      COMMAND ${GLMX_HIP_COMPILER} ${GLMX_HIP_OPTIONS} ${archs} ${more} -I${PROJECT_SOURCE_DIR}/csrc -I${PROJECT_SOURCE_DIR}/csrc/include
        -MD -MF ${object}.d -c ${PROJECT_SOURCE_DIR}/csrc/gpu/${source} -o ${object}
      COMMENT "HIP ${source}" VERBATIM)
    list(APPEND objects ${object})
  endforeach()
  add_custom_target(glmx_hip DEPENDS ${objects})
  add_dependencies(${core} glmx_hip)
  target_sources(${core} PRIVATE ${objects})
  target_link_libraries(${core} PRIVATE ${GLMX_HIP_RUNTIME})
endfunction()
