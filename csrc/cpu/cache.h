// Values that have been computed from a few numbers, kept for the next call with the same numbers.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace rnnfast::cpu {

// Keeps one value for each of kEntries hashes of the numbers. Not for several threads: each has its
// own.
template <class Value, size_t kNumbers>
class Cache {
 public:
  using Key = std::array<int64_t, kNumbers>;

  // The value of a key, by make() where it is not there.
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
