#include "remote/remote_tier.hpp"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <new>
#include <utility>

namespace flexkv {

RemoteTier::RemoteTier(BlockKey name_space, BlockKey refold, uint64_t num_slots, size_t call_bytes,
                       std::string engine_name)
    : refold_(refold),
      num_slots_(num_slots),
      call_bytes_(call_bytes),
      engine_name_(std::move(engine_name)),
      name_space_(name_space) {}

void RemoteTier::Attach(const Above& above) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Require(!attached_, "a tier is under one engine at a time");
  above_ = above;
  attached_ = true;
}

void RemoteTier::Detach() {
  const std::lock_guard<std::mutex> lock(mutex_);
  attached_ = false;
  above_.host.reset();
}

void RemoteTier::Start(TierTransfer* transfer) {
  transfer->Begin(1);
  if (transfer->num_blocks == 0) return transfer->End();
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    QueueOf(transfer->store).push_back({transfer, 0, transfer->num_blocks});
  }
  changed_.notify_all();
}

std::vector<TierTransfer*> RemoteTier::DropGivenUp() {
  std::vector<TierTransfer*> ended;
  const double now_s = above_.Now();
  for (std::list<Work>* queue : {&loads_, &stores_}) {
    for (auto work = queue->begin(); work != queue->end();) {
      TierTransfer* transfer = work->transfer;
      if (transfer->GivenUp(now_s)) {
        for (; work->next < transfer->num_blocks; ++work->next, --work->unended) {
          transfer->Spoil(static_cast<uint32_t>(work->next), BlockOutcome::kDropped);
        }
      }
      if (work->unended > 0) {
        ++work;
        continue;
      }
      ended.push_back(transfer);
      work = queue->erase(work);
    }
  }
  return ended;
}

double RemoteTier::oldest_s() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return running_.empty() ? 0 : above_.Now() - running_.front()->start_s_;
}

void RemoteTier::set_name_space(BlockKey name_space) {
  const std::lock_guard<std::mutex> lock(mutex_);
  name_space_ = name_space;
}

std::shared_ptr<RemoteTier::Call> RemoteTier::Take(bool store, double timeout_s) {
  auto call = std::make_shared<Call>();
  std::list<Work>& queue = QueueOf(store);
  std::vector<TierTransfer*> ended;
  const auto deadline =
      std::chrono::steady_clock::now() + std::chrono::duration_cast<std::chrono::steady_clock::duration>(
                                             std::chrono::duration<double>(timeout_s));
  {
    std::unique_lock<std::mutex> lock(mutex_);
    std::list<Work>::iterator work;
    const auto has_work = [&] {
      if (ended.empty()) ended = DropGivenUp();
      work = std::find_if(queue.begin(), queue.end(),
                          [](const Work& each) { return each.next < each.transfer->num_blocks; });
      return work != queue.end() || !ended.empty();
    };
    changed_.wait_until(lock, deadline, has_work);
    if (work != queue.end()) {
      const TierTransfer& transfer = *work->transfer;
      call->shape_ = {name_space_, above_.slice_offsets};
      call->store_ = store;
      call->work_ = work;
      call->host_ = above_.host;
      call->start_s_ = above_.Now();
      const size_t block_bytes = above_.slice_offsets.back();
      const size_t at_once = std::max<size_t>(1, call_bytes_ / block_bytes);
      for (; work->next < transfer.num_blocks && call->size() < at_once; ++work->next) {
        call->blocks_.push_back(static_cast<uint32_t>(work->next));
        const BlockKey key = transfer.keys[work->next];
        call->keys_.push_back({key.lo ^ refold_.lo, key.hi ^ refold_.hi});
        call->bodies_.push_back(above_.host->Slot(transfer.host_slots[work->next]));
        call->body_bytes_.push_back(block_bytes);
      }
      running_.push_back(call.get());
    }
  }
  for (TierTransfer* transfer : ended) transfer->End();
  if (call->size() == 0) return nullptr;
  call->headers_.reset(
      static_cast<char*>(std::aligned_alloc(kIoAlignment, call->size() * kValueHeaderBytes)));
  if (call->headers_ == nullptr) throw std::bad_alloc();
  for (size_t i = 0; store && i < call->size(); ++i) {
    EncodeValueHeader(call->shape_, call->keys_[i], call->body(i), call->header(i));
  }
  return call;
}

void RemoteTier::Call::Compress(size_t i, Compression how) {
  Require(store_ && i < size(), "a block is compressed before it is stored");
  if (compressed_.empty()) compressed_.resize(size());
  if (how == Compression::kNone || compressed_[i] != nullptr) return;
  std::unique_ptr<char, Free> to(static_cast<char*>(std::aligned_alloc(kIoAlignment, body_bytes_[i])));
  if (to == nullptr) throw std::bad_alloc();
  const size_t bytes = CompressValue(shape_, keys_[i], how, bodies_[i], header(i), to.get());
  if (bytes == 0) return;
  bodies_[i] = to.get();
  body_bytes_[i] = bytes;
  compressed_[i] = std::move(to);
}

std::pair<std::vector<BlockOutcome>, std::string> RemoteTier::Verify(Call* call,
                                                                     std::vector<BlockOutcome> outcomes,
                                                                     const std::vector<size_t>& sizes) {
  Require(outcomes.size() == call->size(), "a call has an outcome for each block");
  Require(call->store() || sizes.size() == call->size(), "what was loaded has a size");
  call->verified_.assign(call->size(), call->store());
  std::string first;
  for (size_t i = 0; !call->store() && i < call->size(); ++i) {
    if (outcomes[i] != BlockOutcome::kGood) continue;
    const bool fits = sizes[i] >= kValueHeaderBytes && sizes[i] <= kValueHeaderBytes + call->body_bytes(i);
    const std::string why = fits ? RestoreValue(call->shape_, call->keys_[i], call->header(i), call->body(i),
                                                sizes[i] - kValueHeaderBytes)
                                 : "it has another size than was stored";
    call->verified_[i] = why.empty();
    if (why.empty()) continue;
    outcomes[i] = BlockOutcome::kCorrupt;
    if (first.empty()) first = engine_name_ + ": a block is not what was stored: " + why;
  }
  return {std::move(outcomes), std::move(first)};
}

void RemoteTier::Settle(Call* call, const std::vector<BlockOutcome>& outcomes, const std::string& why) {
  Require(!call->settled_, "a call is settled once");
  Require(outcomes.size() == call->size(), "a call has an outcome for each block");
  for (size_t i = 0; i < call->size(); ++i) {
    Require(outcomes[i] != BlockOutcome::kGood || call->store() ||
                (!call->verified_.empty() && call->verified_[i]),
            "a block that was loaded is verified first");
  }
  call->settled_ = true;
  TierTransfer& transfer = *call->work_->transfer;
  for (size_t i = 0; i < call->size(); ++i) {
    const uint32_t block = call->blocks_[i];
    if (outcomes[i] == BlockOutcome::kGood) {
      for (uint32_t step = 0; step < transfer.num_steps(); ++step) transfer.Land(step, block);
    } else {
      const bool says_why = outcomes[i] == BlockOutcome::kFailed || outcomes[i] == BlockOutcome::kCorrupt;
      transfer.Spoil(block, outcomes[i], says_why ? why : "");
    }
  }
  bool ended = false;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    running_.remove(call);
    call->work_->unended -= call->size();
    if (call->work_->unended == 0) {
      QueueOf(call->store()).erase(call->work_);
      ended = true;
    }
  }
  if (ended) transfer.End();
}

}  // namespace flexkv
