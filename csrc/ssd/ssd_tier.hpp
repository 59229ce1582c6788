// The SSD tier as those see it who move blocks: the lanes of its directories, over a store.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "ssd/io_engine.hpp"
#include "ssd/ssd_lane.hpp"
#include "ssd/ssd_store.hpp"
#include "tier/lower_tier.hpp"

namespace flexkv {

struct SsdIoOptions {
  IoEngineKind kind = IoEngineKind::kAuto;
  int depth = 64;  // transfers in flight per directory
  std::shared_ptr<WriteLimit> write_limit = std::make_shared<WriteLimit>(0);
};

class SsdTier : public LowerTier {
 public:
  SsdTier(std::shared_ptr<SsdStore> store, const SsdIoOptions& options);

  void Attach(const Above& above) override;
  void Detach() override { lanes_.clear(); }
  uint64_t num_slots() const override { return store_->num_slots(); }
  void Start(TierTransfer* transfer) override;
  void Wake() override;
  double oldest_s() const override;
  std::string engine_name() const override { return engine_name_; }
  std::string engine_note() const override { return engine_note_; }

 private:
  const std::shared_ptr<SsdStore> store_;
  const SsdIoOptions options_;
  std::vector<std::unique_ptr<SsdLane>> lanes_;  // one per directory, while attached
  std::string engine_name_ = "none", engine_note_;
};

}  // namespace flexkv
