// What Python sees of the tier room: a tier below the CPU tier as an engine takes it, and how
// blocks end.
#include <memory>

#include "bindings/bindings.hpp"
#include "tier/lower_tier.hpp"

namespace flexkv {

void BindTier(py::module_& m) {
  py::enum_<BlockOutcome>(m, "BlockOutcome")
      .value("GOOD", BlockOutcome::kGood)
      .value("FAILED", BlockOutcome::kFailed)
      .value("CORRUPT", BlockOutcome::kCorrupt)
      .value("DROPPED", BlockOutcome::kDropped)
      .value("MISSING", BlockOutcome::kMissing);

  py::class_<LowerTier, std::shared_ptr<LowerTier>>(m, "LowerTier")
      .def_property_readonly("num_slots", &LowerTier::num_slots)
      .def_property_readonly("oldest_s", &LowerTier::oldest_s)
      .def_property_readonly("engine_name", &LowerTier::engine_name)
      .def_property_readonly("engine_note", &LowerTier::engine_note);
}

}  // namespace flexkv
