// glmx._native: what this build and this machine are. No torch here; it links the same core as the op library.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "core/check.h"
#include "core/dispatch.h"
#include "core/elementwise.h"
#include "core/features.h"
#include "core/parallel.h"
#include "core/recording.h"
#include "gpu/kernels.h"

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
    row["gpu"] = glmx::gpu_kernel(info);
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

py::object version_or_none(const std::string& version) { return version.empty() ? py::object(py::none()) : py::str(version); }

py::dict build_info() {
  py::dict out;
  out["version"] = GLMX_VERSION;
  out["compiler"] = GLMX_COMPILER;
  out["build_type"] = GLMX_BUILD_TYPE;
  out["cuda"] = version_or_none(GLMX_CUDA_VERSION);
  out["hip"] = version_or_none(GLMX_HIP_VERSION);
  return out;
}

// Whose kernels this process has; "simt" once it is loaded.
std::vector<std::string> backends() {
  std::vector<std::string> out = {glmx::backend_name(glmx::Backend::cpu)};
  for (glmx::Backend backend : {glmx::Backend::cuda, glmx::Backend::hip, glmx::Backend::simt}) {
    if (glmx::gpu::kernels(backend) != nullptr) out.emplace_back(glmx::backend_name(backend));
  }
  return out;
}

std::vector<std::string> gpu_kernels(const std::string& name) {
  for (glmx::Backend backend : {glmx::Backend::cuda, glmx::Backend::hip, glmx::Backend::simt}) {
    if (name == glmx::backend_name(backend)) return glmx::gpu_kernels(backend);
  }
  throw py::value_error("backend: expected cuda, hip or simt: got " + name);
}

// The cards that this build's GPU backend sees: none without a driver.
py::list gpu_devices() {
  py::list out;
  for (glmx::Backend backend : {glmx::Backend::cuda, glmx::Backend::hip}) {
    const glmx::gpu::Kernels* table = glmx::gpu::kernels(backend);
    for (int i = 0; table != nullptr && i < table->device_count(); ++i) {
      py::dict device;
      device["device"] = std::string("cuda:") + std::to_string(i);  // torch calls AMD's cards that too
      device["name"] = table->device_name(i);
      device["architecture"] = table->architecture(i);
      out.append(device);
    }
  }
  return out;
}

// The library installs itself: csrc/gpu/table.cu.
void load_simt(const std::string& path) {
  GLMX_CHECK(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL) != nullptr, "GLMX_BACKEND=simt: ", dlerror());
  GLMX_CHECK(glmx::gpu::kernels(glmx::Backend::simt) != nullptr, "GLMX_BACKEND=simt: ", path, " holds no simt backend");
}

template <class T>
T* address(uintptr_t pointer) {
  return reinterpret_cast<T*>(pointer);
}

glmx::DType model_dtype(bool bf16) { return bf16 ? glmx::DType::bf16 : glmx::DType::f32; }

using Dims = std::array<int64_t, glmx::kCopyDims>;

void copy(uintptr_t to, uintptr_t from, const Dims& sizes, const Dims& to_strides, const Dims& from_strides, int64_t bytes) {
  glmx::CopyParams p{address<void>(from), address<void>(to), {}, {}, {}, bytes};
  std::copy(sizes.begin(), sizes.end(), p.sizes);
  std::copy(from_strides.begin(), from_strides.end(), p.from_strides);
  std::copy(to_strides.begin(), to_strides.end(), p.to_strides);
  glmx::run(glmx::copy_elements, p);
}

void gather(uintptr_t to, uintptr_t from, uintptr_t rows, int64_t n, int64_t from_rows, int64_t row_bytes) {
  glmx::run(glmx::gather_rows, {address<void>(from), address<int64_t>(rows), address<void>(to), n, from_rows, row_bytes});
}

void add(uintptr_t out, uintptr_t a, uintptr_t b, int64_t n, bool bf16) {
  glmx::run(glmx::add_elements, {address<void>(a), address<void>(b), address<void>(out), n, model_dtype(bf16)});
}

void scale(uintptr_t out, uintptr_t x, int64_t n, float factor) {
  glmx::run(glmx::scale_elements, {address<float>(x), address<float>(out), n, factor});
}

// Of hundreds of modules, before every step: whether tables[i][names[i]] is objects[i] for each i, and whether dicts are all empty.
bool same_objects(const py::list& tables, const py::list& names, const py::list& objects) {
  for (size_t i = 0; i < objects.size(); ++i) {
    PyObject* const table = PyList_GET_ITEM(tables.ptr(), i);
    if (PyDict_GetItem(table, PyList_GET_ITEM(names.ptr(), i)) != PyList_GET_ITEM(objects.ptr(), i)) return false;
  }
  return true;
}

bool all_empty(const py::list& dicts) {
  return std::all_of(dicts.begin(), dicts.end(), [](py::handle dict) { return PyDict_Size(dict.ptr()) == 0; });
}

// What python/glmx/models/recorder.py records with. Pointers are addresses of dense memory, or of memory with the given strides.
void define_recording(py::module_& m) {
  py::class_<glmx::Recording>(m, "Recording", "The op calls of one forward; `replay` makes them again.")
      .def(py::init<>())
      .def("begin", &glmx::Recording::begin, "This thread's op calls are kept from here to `end`.")
      .def_static("end", &glmx::Recording::end)
      .def("__len__", &glmx::Recording::size)
      .def("replay", &glmx::Recording::replay, py::call_guard<py::gil_scoped_release>());
  m.def("same_objects", same_objects);
  m.def("all_empty", all_empty);
  m.def("copy", copy);
  m.def("gather", gather);
  m.def("add", add);
  m.def("scale", scale);
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
  m.def("backends", backends, "Whose kernels this process has: cpu, and cuda or hip where they are built; simt once it is loaded.");
  m.def("gpu_kernels", gpu_kernels, py::arg("backend"), "The ops that tensors of this backend run; empty where it is not in this process.");
  m.def("gpu_devices", gpu_devices, "The cards that the GPU backend of this build sees.");
  m.def("load_simt", load_simt, py::arg("path"), "For tests: loads the CPU that plays GPU; CPU tensors then run the GPU's kernels.");
  m.def("set_small_work", glmx::set_small_work, py::arg("nanoseconds"),
        "For tests: the work below which an op stays on the calling thread; returns the former value.");
  define_recording(m);
}
