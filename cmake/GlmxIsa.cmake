# Folder = compile flags: csrc/cpu/<isa>/*.cpp are compiled with that ISA's flags and nothing else is.
# base is plain x86-64 (SSE2). Never -march=native: a wheel runs on machines that its builder never saw.
set(GLMX_ISA_FLAGS_base "")
set(GLMX_ISA_FLAGS_avx2 -mavx2 -mfma)
set(GLMX_ISA_FLAGS_avx512 -mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl)
set(GLMX_ISA_FLAGS_avx512_bf16 ${GLMX_ISA_FLAGS_avx512} -mavx512bf16 -mavx512vbmi)
set(GLMX_ISA_FLAGS_amx ${GLMX_ISA_FLAGS_avx512} -mamx-tile -mamx-bf16)
set(GLMX_ISAS base avx2 avx512 avx512_bf16 amx)

function(glmx_isa_objects isa out)
  file(GLOB sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/cpu/${isa}/*.cpp)
  if(NOT sources)
    set(${out} "" PARENT_SCOPE)
    return()
  endif()
  add_library(glmx_cpu_${isa} OBJECT ${sources})
  target_include_directories(glmx_cpu_${isa} PRIVATE ${PROJECT_SOURCE_DIR}/csrc ${PROJECT_SOURCE_DIR}/csrc/include)
  glmx_compile_options(glmx_cpu_${isa})
  # The compiler's own vectoriser is off: vector code is written out, and base stays the readable oracle.
  target_compile_options(glmx_cpu_${isa} PRIVATE ${GLMX_ISA_FLAGS_${isa}} -fno-tree-vectorize -falign-functions=64 -falign-loops=64 -fno-exceptions
    -Wno-uninitialized -Wno-maybe-uninitialized)  # false alarms inside gcc 12's own intrinsics
  set_target_properties(glmx_cpu_${isa} PROPERTIES CXX_VISIBILITY_PRESET hidden)
  set(${out} $<TARGET_OBJECTS:glmx_cpu_${isa}> PARENT_SCOPE)
endfunction()

# The core: every ISA's kernels, host side, dispatch. Its classes and functions are visible to the two libraries that link it.
function(glmx_core_library target)
  file(GLOB sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/core/*.cpp ${PROJECT_SOURCE_DIR}/csrc/ops/*.cpp ${PROJECT_SOURCE_DIR}/csrc/gpu/*.cpp)
  set(objects "")
  foreach(isa ${GLMX_ISAS})
    glmx_isa_objects(${isa} isa_objects)
    list(APPEND objects ${isa_objects})
  endforeach()
  add_library(${target} SHARED ${sources} ${objects})
  target_include_directories(${target} PUBLIC ${PROJECT_SOURCE_DIR}/csrc ${PROJECT_SOURCE_DIR}/csrc/include)
  glmx_compile_options(${target})
  target_link_options(${target} PRIVATE -Wl,--no-undefined)
  set_target_properties(${target} PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${GLMX_OUT} BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "$ORIGIN")
endfunction()
