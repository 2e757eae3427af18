// The host module `openllama.data._host`: packing and batch assembly, without torch, so that any process can
// load it.
//
// openllama/data/twin.py is the same in numpy: the definition, the tests' oracle, and what serves where this
// is not built. Sizes are tokens. Arguments are checked by openllama/data/pack.py; what could read or write
// out of bounds is checked here once more.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

template <typename T>
Array<T> to_array(std::vector<T>&& values) {
  auto* owner = new std::vector<T>(std::move(values));
  py::capsule free(owner, [](void* p) { delete static_cast<std::vector<T>*>(p); });
  return Array<T>(owner->size(), owner->data(), free);
}

// ---------------------------------------------------------------- packing

enum class Long { split, sample, truncate };

struct Pieces {
  std::vector<int64_t> source;  // where the first token lies
  std::vector<int32_t> length;  // inputs; the labels lie one further
  std::vector<int64_t> slack;   // how much further on it may start; empty unless long documents are sampled
};

Pieces cut(const int64_t* start, const int64_t* tokens, int64_t documents, int64_t context, Long mode) {
  Pieces pieces;
  pieces.source.reserve(documents);
  pieces.length.reserve(documents);
  const bool sampled = mode == Long::sample;
  if (sampled) pieces.slack.reserve(documents);
  for (int64_t d = 0; d < documents; ++d) {
    const int64_t labels = tokens[d] - 1;
    for (int64_t at = 0; at < labels; at += context) {
      pieces.source.push_back(start[d] + at);
      pieces.length.push_back(static_cast<int32_t>(std::min(context, labels - at)));
      if (sampled) pieces.slack.push_back(std::max<int64_t>(labels - context, 0));
      if (mode != Long::split) break;
    }
  }
  return pieces;
}

// The rooms that some bin has, as bits, with a second level that says which words hold any.
class Rooms {
 public:
  explicit Rooms(int64_t capacity) : words_(capacity / 64 + 1), summary_(words_.size() / 64 + 1) {}

  void add(int64_t room) {
    words_[room >> 6] |= 1ull << (room & 63);
    summary_[room >> 12] |= 1ull << ((room >> 6) & 63);
  }

  void remove(int64_t room) {
    if (!(words_[room >> 6] &= ~(1ull << (room & 63)))) summary_[room >> 12] &= ~(1ull << ((room >> 6) & 63));
  }

  // The smallest room of at least `size`, or -1.
  int64_t tightest(int64_t size) const {
    const uint64_t here = words_[size >> 6] >> (size & 63);
    if (here) return size + std::countr_zero(here);
    const size_t next = (size >> 6) + 1;  // the first word after
    for (size_t s = next >> 6; s < summary_.size(); ++s) {
      uint64_t held = summary_[s];
      if (s == next >> 6) held = held >> (next & 63) << (next & 63);
      if (!held) continue;
      const int64_t word = static_cast<int64_t>(s) * 64 + std::countr_zero(held);
      return word * 64 + std::countr_zero(words_[word]);
    }
    return -1;
  }

 private:
  std::vector<uint64_t> words_, summary_;
};

// 0 .. count - 1 in stable order of their key, each in [0, limit); `first` says where each key begins.
template <typename Key>
std::vector<int64_t> counting_sort(int64_t count, int64_t limit, std::vector<int64_t>& first, Key key) {
  first.assign(limit + 1, 0);
  for (int64_t i = 0; i < count; ++i) ++first[key(i) + 1];
  std::partial_sum(first.begin(), first.end(), first.begin());
  std::vector<int64_t> order(count), at(first.begin(), first.end() - 1);
  for (int64_t i = 0; i < count; ++i) order[at[key(i)]++] = i;
  return order;
}

// Best-fit decreasing (see twin.py): the bin of each piece, and the number of bins.
std::pair<std::vector<int64_t>, int64_t> best_fit(const std::vector<int32_t>& length, int64_t capacity) {
  std::vector<int64_t> ignored;
  const auto shortness = [&](int64_t i) { return capacity - length[i]; };
  const auto order = counting_sort(length.size(), capacity, ignored, shortness);
  std::vector<int64_t> bins(length.size());
  std::vector<int64_t> top(capacity + 1, -1), below;  // per room a stack of bins, linked through `below`
  Rooms rooms(capacity);
  for (int64_t piece : order) {
    const int64_t size = length[piece];
    int64_t room = rooms.tightest(size), bin;
    if (room < 0) {
      room = capacity;
      bin = static_cast<int64_t>(below.size());
      below.push_back(-1);
    } else {
      bin = top[room];
      if ((top[room] = below[bin]) < 0) rooms.remove(room);
    }
    if (const int64_t left = room - size) {
      below[bin] = top[left];
      top[left] = bin;
      rooms.add(left);
    }
    bins[piece] = bin;
  }
  return {std::move(bins), static_cast<int64_t>(below.size())};
}

template <typename T>
void reorder(std::vector<T>& values, const std::vector<int64_t>& order) {
  std::vector<T> out(values.size());
  for (size_t i = 0; i < values.size(); ++i) out[i] = values[order[i]];
  values.swap(out);
}

// The pieces in the order of their packs, and where each pack begins.
std::pair<Pieces, std::vector<int64_t>> packed(Pieces pieces, int64_t context) {
  std::vector<int64_t> order, first;
  {
    const auto [bins, count] = best_fit(pieces.length, context);
    order = counting_sort(bins.size(), count, first, [&](int64_t i) { return bins[i]; });
  }
  reorder(pieces.source, order);
  reorder(pieces.length, order);
  reorder(pieces.slack, order);
  return {std::move(pieces), std::move(first)};
}

py::tuple pack(Array<int64_t> start, Array<int64_t> tokens, int64_t context, const std::string& longs) {
  if (start.size() != tokens.size()) throw std::invalid_argument("start and tokens differ in length");
  if (context < 1 || context > INT32_MAX) throw std::invalid_argument("context is out of range");
  const Long mode = longs == "split" ? Long::split : longs == "sample" ? Long::sample : Long::truncate;
  Pieces pieces;
  std::vector<int64_t> first;
  {
    const int64_t *s = start.data(), *t = tokens.data(), documents = start.size();
    py::gil_scoped_release release;
    std::tie(pieces, first) = packed(cut(s, t, documents, context, mode), context);
  }
  return py::make_tuple(to_array(std::move(pieces.source)), to_array(std::move(pieces.length)),
                        to_array(std::move(pieces.slack)), to_array(std::move(first)));
}

// ---------------------------------------------------------------- batches

// splitmix64's finaliser (Steele, Lea, Flood, 2014): equal draws here and in the twin, whatever numpy does.
uint64_t mixed(uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

struct Out {
  int64_t *ids, *labels;
  int32_t* positions;
};

template <typename Id>
void copy_piece(const Id* from, int64_t length, Out out) {
  for (int64_t i = 0; i < length; ++i) {
    out.ids[i] = from[i];
    out.labels[i] = from[i + 1];
    out.positions[i] = static_cast<int32_t>(i);
  }
}

void pad_piece(int64_t length, int64_t pad, int64_t ignored, Out out) {
  for (int64_t i = 0; i < length; ++i) {
    out.ids[i] = pad;
    out.labels[i] = ignored;
    out.positions[i] = static_cast<int32_t>(i);
  }
}

template <typename Id>
py::tuple fill(const std::vector<Array<Id>>& tokens, Array<int64_t> source, Array<int32_t> length,
               Array<int64_t> slack, Array<int64_t> first, Array<int64_t> packs, int64_t batch,
               int64_t context, int64_t pad, int64_t ignored, Array<uint64_t> keys) {
  Array<int64_t> ids(batch * context), labels(batch * context);
  Array<int32_t> positions(batch * context);
  std::vector<int64_t> base(tokens.size() + 1);  // where each file's tokens begin, counted over all of them
  for (size_t i = 0; i < tokens.size(); ++i) base[i + 1] = base[i] + tokens[i].size();
  std::vector<int32_t> borders{0};
  int64_t targets = 0, longest = 0, at = 0;
  auto next = [&](int64_t size) {
    const Out out{ids.mutable_data() + at, labels.mutable_data() + at, positions.mutable_data() + at};
    at += size;
    borders.push_back(static_cast<int32_t>(at));
    longest = std::max(longest, size);
    return out;
  };
  for (int64_t b = 0; b < batch; ++b) {
    int64_t room = context;
    const bool missing = b >= packs.size();  // at an epoch's end: all padding
    const int64_t p = missing ? 0 : packs.at(b);
    if (p < 0) throw std::out_of_range("a pack's number is negative");  // which at() would let pass
    for (int64_t i = missing ? 0 : first.at(p), end = missing ? 0 : first.at(p + 1); i < end; ++i) {
      const int64_t size = length.at(i), more = slack.size() ? slack.at(i) : 0;
      int64_t from = source.at(i);
      if (more) from += static_cast<int64_t>(mixed(keys.at(b) ^ mixed(i)) % (more + 1));
      const size_t file = std::upper_bound(base.begin(), base.end(), from) - base.begin() - 1;
      if (from < 0 || size > room || file >= tokens.size() || from + size + 1 > base[file + 1])
        throw std::out_of_range("a piece lies outside of the tokens or of its pack");
      copy_piece(tokens[file].data() + (from - base[file]), size, next(size));
      room -= size;
      targets += size;
    }
    if (room) pad_piece(room, pad, ignored, next(room));
  }
  return py::make_tuple(ids, labels, positions, to_array(std::move(borders)), longest, targets);
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Packing and batch assembly; see openllama/data/pack.py.";
  m.def("pack", &pack);
  m.def("fill", &fill<uint16_t>);
  m.def("fill", &fill<uint32_t>);
}
