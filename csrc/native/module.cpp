// glmx._native: what this build and this machine are. No torch here; it links the same core as the op library.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/check.h"
#include "core/dispatch.h"
#include "core/features.h"
#include "core/parallel.h"

namespace py = pybind11;

namespace {

std::vector<std::string> isa_names(const std::vector<glmx::Isa>& isas) {
  std::vector<std::string> out;
  for (glmx::Isa isa : isas) out.emplace_back(glmx::isa_name(isa));
  return out;
}

// One row per op and variant: which kernel runs under `isa`.
py::list kernel_table(const std::string& isa) {
  glmx::Isa level = glmx::Isa::base;
  if (isa.empty()) {
    level = glmx::active_isa();
  } else {
    bool known = false;
    for (glmx::Isa candidate : glmx::kIsas) {
      if (isa != glmx::isa_name(candidate)) continue;
      level = candidate;
      known = true;
    }
    if (!known) throw py::value_error("isa: expected base, avx2, avx512, avx512_bf16 or amx: got " + isa);
  }
  py::list rows;
  for (const glmx::OpInfo& info : glmx::op_table()) {
    py::dict row;
    row["op"] = info.op;
    row["variant"] = info.variant;
    row["kernel"] = glmx::isa_name(glmx::chosen_isa(info, level));
    row["revision"] = info.revision;
    rows.append(row);
  }
  return rows;
}

py::dict op_revisions() {
  py::dict out;
  for (const glmx::OpInfo& info : glmx::op_table()) out[info.op] = info.revision;
  return out;
}

py::dict build_info() {
  py::dict out;
  out["version"] = GLMX_VERSION;
  out["compiler"] = GLMX_COMPILER;
  out["build_type"] = GLMX_BUILD_TYPE;
  out["cuda"] = py::none();
  out["hip"] = py::none();
  return out;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Build information, CPU features and the kernel table of glmx.";
  py::register_exception<glmx::Error>(m, "NativeError", PyExc_ValueError);
  m.def("machine_isa", [] { return std::string(glmx::isa_name(glmx::machine_isa())); }, "The best ISA level of this machine.");
  m.def("active_isa", [] { return std::string(glmx::isa_name(glmx::active_isa())); }, "The level in force (GLMX_ISA).");
  m.def("supported_isas", [] { return isa_names(glmx::supported_isas()); }, "Every level this machine runs, base first.");
  m.def("cpu_model", glmx::cpu_model);
  m.def("kernel_table", kernel_table, py::arg("isa") = "", "Which kernel each op runs under an ISA level (default: the active one).");
  m.def("op_revisions", op_revisions, "Kernel revision per op: raised by whoever changes its bits.");
  m.def("build_info", build_info);
  m.def("set_small_work", glmx::set_small_work, py::arg("nanoseconds"),
        "For tests: the work below which an op stays on the calling thread; returns the former value.");
}
