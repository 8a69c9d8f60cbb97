# The flags of every C++ file: warnings are errors in our own code, and the compiler has no freedom over floating point.
# -ffp-contract=off: an FMA is written out or does not happen (DESIGN.md, "No compiler freedom").
function(glmx_compile_options target)
  target_compile_options(${target} PRIVATE -Wall -Wextra -Wno-unused-function -Wno-psabi -ffp-contract=off -fno-fast-math)
  if(GLMX_SANITIZE)
    # -O1: at -O2 the instrumented scalar kernels take four times as long to compile.
    target_compile_options(${target} PRIVATE -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -g1)
    target_link_options(${target} PRIVATE -fsanitize=address,undefined)
  endif()
endfunction()
