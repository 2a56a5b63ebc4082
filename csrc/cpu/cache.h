// A small cache of values that are computed from a few integers, such as plans.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace rnnfast::cpu {

// Direct-mapped: a hash of the key picks one of kEntries slots, and a new key replaces the old one.
// Not thread-safe; use one cache per thread.
template <class Value, size_t kNumbers>
class Cache {
 public:
  using Key = std::array<int64_t, kNumbers>;

  // Returns the value of the key, calling make() if it is not cached.
  template <class F>
  const Value& get(const Key& key, F&& make) {
    uint64_t hash = 0;
    for (const int64_t number : key) hash = (hash ^ uint64_t(number)) * 0x9e3779b97f4a7c15;
    Entry& entry = entries_[(hash >> 32) % kEntries];
    if (!entry.full || entry.key != key) entry = {key, make(), true};
    return entry.value;
  }

 private:
  static constexpr size_t kEntries = 64;
  struct Entry {
    Key key{};
    Value value{};
    bool full = false;
  };
  std::array<Entry, kEntries> entries_;
};

}  // namespace rnnfast::cpu
