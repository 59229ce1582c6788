// The module _core: errors as Python's, and the rooms one after the other.
#include <exception>

#include "bindings/bindings.hpp"
#include "ssd/disk.hpp"
#include "ssd/ssd_image.hpp"

using namespace flexkv;

PYBIND11_MODULE(_core, m) {
  m.doc() = "C++ core of sglang-flexkv: prefix index, host pool, transfer engine.";
  py::register_exception<UsageError>(m, "CoreUsageError", PyExc_ValueError);
  auto& system_error = py::register_exception<SystemError>(m, "CoreSystemError", PyExc_OSError);
  py::register_exception<MismatchError>(m, "CoreMismatchError", system_error.ptr());
  static py::handle disk_error;
  disk_error = py::exception<DiskError>(m, "CoreDiskError", system_error.ptr()).release();
  py::register_exception_translator([](std::exception_ptr raised) {
    try {
      if (raised) std::rethrow_exception(raised);
    } catch (const DiskError& error) {
      // What every OSError has: errno, strerror and filename.
      PyErr_SetObject(disk_error.ptr(), py::make_tuple(error.error(), error.what(), error.path()).ptr());
    }
  });
  m.attr("IO_ALIGNMENT") = kIoAlignment;

  BindIndex(m);
  BindMemory(m);
  BindCopy(m);
  BindTier(m);
  BindSsd(m);
  BindRemote(m);
  BindTransfer(m);
}
