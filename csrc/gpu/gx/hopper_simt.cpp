// Hopper's own on the CPU that plays GPU: bulk tensor copies, mbarriers, warpgroup products with their descriptors.
#include "gpu/gx/hopper_simt.h"

#include <algorithm>
#include <utility>

#include "gpu/gx/simt_engine.h"

namespace gx {
namespace simt {
namespace {

constexpr int kRowBytes = 128, kSwizzleBytes = 1024;  // a row of 64 bf16; eight of them are a swizzle's period
// Shared memory as descriptors address it, in 18 bits. Hopper keeps the first KiB of the window to itself.
constexpr uint32_t kSharedBase = 1024;

// Where the byte at this offset of a tile lies: the address' bits 7..9 (which row of eight) are added to bits 4..6 (which 16 bytes).
constexpr uint32_t swizzle(uint32_t address) { return address ^ ((address >> 3) & 0x70); }

uint32_t shared_address(const Worker& w, const void* p) {
  return kSharedBase + static_cast<uint32_t>(static_cast<const unsigned char*>(p) - w.block.dynamic_shared);
}

std::string name_of(const Worker& w, const uint64_t* mbarrier) {
  for (size_t i = 0; i < w.mbarriers.size(); ++i) {
    if (w.mbarriers[i].at == mbarrier) return "mbarrier " + std::to_string(i) + " of those initialised";
  }
  return "an mbarrier";
}

KnownMbarrier& known(const char* what, const uint64_t* b) {
  Fiber& f = current();
  for (KnownMbarrier& k : f.worker->mbarriers) {
    if (k.at == b) return k;
  }
  fault("%s: nobody has initialised the mbarrier at %p", what, static_cast<const void*>(b));
}

// Ends the phase if all has arrived. Returns what is wrong, or nothing.
std::string settle(const Worker& w, uint64_t* b, Phase phase) {
  std::string wrong;
  if (phase.pending == 0 && phase.bytes < 0) {
    wrong = name_of(w, b) + " received " + std::to_string(-phase.bytes) + " bytes more than this phase expects";
  }
  if (phase.pending == 0 && phase.bytes == 0) {
    phase.pending = phase.arrivals;
    phase.parity ^= 1;
  }
  memcpy(b, &phase, 8);
  return wrong;
}

void arrive(const char* what, uint64_t* b, int bytes) {
  known(what, b);
  Phase phase = phase_of(b);
  if (phase.pending == 0) fault("%s: %s expects no more arrivals in this phase", what, name_of(*current().worker, b).c_str());
  --phase.pending;
  phase.bytes += bytes;
  const std::string wrong = settle(*current().worker, b, phase);
  if (!wrong.empty()) fault("%s: %s", what, wrong.c_str());
}

}  // namespace

std::string Worker::describe(const Fiber& f) {
  const Phase phase = phase_of(f.mbarrier);
  return "wait at mbarrier_wait in " + text_of(f.site) + ", parity " + std::to_string(f.parity) + ": " + name_of(*this, f.mbarrier) +
         " lacks " + std::to_string(phase.pending) + " arrivals and " + std::to_string(phase.bytes) + " bytes";
}

void Worker::begin_hopper() {
  block.hopper = true;
  writes.assign(launch->shared / 16 + 1, {0, 0});
  time = 0;
}

void Worker::written(Fiber& f, const void* p) {
  if (!in_dynamic(p, 16)) return;
  const auto unit = static_cast<uint32_t>((static_cast<const unsigned char*>(p) - block.dynamic_shared) / 16);
  writes[unit] = {++time, f.index.x};
  issued(f).written.push_back(unit);
}

namespace {
void deliver(Worker& w, const InFlight& copy) {
  const TensorMap& map = copy.map;
  for (int r = 0; r < map.box_rows; ++r) {
    uint16_t line[kRowBytes / 2] = {};
    const int64_t row = int64_t{copy.row} + r;
    for (int c = 0; c < map.box_columns; ++c) {
      const int64_t column = int64_t{copy.column} + c;
      if (row >= 0 && row < map.rows && column >= 0 && column < map.columns) line[c] = map.base[row * map.row_stride + column];
    }
    for (int c = 0; c < kRowBytes; c += 16) {
      const uint32_t at = swizzle(static_cast<uint32_t>(r * kRowBytes + c));
      memcpy(copy.to + at, reinterpret_cast<const unsigned char*>(line) + c, 16);
      w.writes[static_cast<size_t>(copy.to - w.block.dynamic_shared + at) / 16].time = 0;
    }
  }
}
}  // namespace

void Worker::finish(size_t index) {
  const InFlight done = std::move(in_flight[index]);
  in_flight.erase(in_flight.begin() + static_cast<std::ptrdiff_t>(index));
  Phase phase = phase_of(done.mbarrier);
  if (done.to != nullptr) {
    deliver(*this, done);
    phase.bytes -= done.map.box_rows * kRowBytes;
  } else {
    land(*done.thread, done.copies.data(), done.copies.size());
    if (phase.pending == 0)
      return fail("copies arrive at " + name_of(*this, done.mbarrier) + ", which expects no more arrivals in this phase");
    --phase.pending;
  }
  const std::string wrong = settle(*this, done.mbarrier, phase);
  if (!wrong.empty()) fail(wrong);
}

// Until an mbarrier's phase ends: before that nobody could go on. In random order any one of them, but of a thread's copies the oldest.
bool Worker::finish_in_flight() {
  if (in_flight.empty()) return false;
  for (bool flipped = false; !flipped && !in_flight.empty() && !failed;) {
    size_t chosen = launch->order == Order::random ? static_cast<size_t>(random.below(static_cast<int>(in_flight.size()))) : 0;
    for (size_t i = 0; i < chosen; ++i) {
      if (in_flight[i].thread != nullptr && in_flight[i].thread == in_flight[chosen].thread) chosen = i;
    }
    uint64_t* const b = in_flight[chosen].mbarrier;
    const Phase before = phase_of(b);
    finish(chosen);
    flipped = phase_of(b).parity != before.parity || launch->order == Order::random;
  }
  return true;
}

void Worker::check_end_of_hopper() {
  if (!in_flight.empty()) return fail("it ends with " + std::to_string(in_flight.size()) + " copies in flight to mbarriers");
  for (const KnownMbarrier& k : mbarriers) {
    const Phase phase = phase_of(k.at);
    if (phase.bytes != 0) return fail("it ends while " + name_of(*this, k.at) + " lacks " + std::to_string(phase.bytes) + " bytes");
  }
}

// ---- Products -------------------------------------------------------------------------------------------------------------------------

namespace {

// A descriptor of PTX's "matrix descriptor" format: what gx::operand() encodes is decoded here field by field.
struct Operand {
  uint32_t start, stride;  // bytes
};
Operand decode(uint64_t descriptor) {
  const Operand operand{static_cast<uint32_t>(descriptor & 0x3fff) << 4, static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4};
  const auto swizzle_mode = static_cast<unsigned>(descriptor >> 62), base_offset = static_cast<unsigned>(descriptor >> 49 & 7);
  if (swizzle_mode != 1) fault("wgmma: the descriptor %#lx has swizzle %u, expected 1 (128 bytes)", descriptor, swizzle_mode);
  if (base_offset != 0 || (operand.start & (kSwizzleBytes - kRowBytes)) != 0) {
    fault("wgmma: the operand at shared address %#x does not begin in the first of eight rows (1024 bytes)", operand.start);
  }
  return operand;
}

// The 16 bytes of k half * 8.. of row r. The whole address is swizzled, as the hardware does it.
const unsigned char* operand_at(const Worker& w, const Operand& operand, int r, int half) {
  const auto row = static_cast<uint32_t>(r);
  const uint32_t address = swizzle(operand.start + row / 8 * operand.stride + row % 8 * kRowBytes + static_cast<uint32_t>(half) * 16);
  const unsigned char* p = w.block.dynamic_shared + address - kSharedBase;
  if (address < kSharedBase || !w.in_dynamic(p, 16)) {
    fault("wgmma: row %d of the operand at shared address %#x lies outside dynamic shared memory", r, operand.start);
  }
  return p;
}

// Rows [0, rows) of 16 k, widened.
void read_operand(float (*out)[16], uint64_t descriptor, int rows) {
  const Worker& w = *current().worker;
  const Operand operand = decode(descriptor);
  for (int r = 0; r < rows; ++r) {
    for (int half = 0; half < 2; ++half) {
      uint16_t bits[8];
      memcpy(bits, operand_at(w, operand, r, half), 16);
      for (int k = 0; k < 8; ++k) out[r][half * 8 + k] = from_bits(uint32_t{bits[k]} << 16);
    }
  }
}
// What threads wrote must be fenced between the write and the product: by the writer, or by the thread that issues the product.
void check_fenced(const Worker& w, const Fiber& f, const unsigned char* p, int row) {
  if (w.writes.empty()) return;
  const Write& write = w.writes[static_cast<size_t>(p - w.block.dynamic_shared) / 16];
  if (write.time <= f.async->fence_time) return;
  fault("wgmma: row %d of its operand was written by thread %u, and no fence_async() has followed", row, write.thread);
}

// A product may read its operands at any time from its issue to its end, so they must be the same at both.
uint64_t digest(const Product& product, bool issued) {
  const Worker& w = *current().worker;
  uint64_t hash = 0;
  for (const auto& [descriptor, rows] : {std::pair(product.a, 64), std::pair(product.b, product.n)}) {
    const Operand operand = decode(descriptor);
    for (int r = 0; r < rows; ++r) {
      for (int half = 0; half < 2; ++half) {
        uint64_t words[2];
        const unsigned char* const p = operand_at(w, operand, r, half);
        if (issued) check_fenced(w, current(), p, r);
        memcpy(words, p, 16);
        for (const uint64_t word : words) hash = (hash ^ word) * 0x9e3779b97f4a7c15u, hash ^= hash >> 29;
      }
    }
  }
  return hash;
}

Sums& sums_of(Async& async, const float* c) {
  for (Sums& s : async.sums) {
    if (s.c == c) return s;
  }
  fault("wgmma: its sums are lost");
}

// Row and column of c[i] of thread t of the warpgroup, as gx::wgmma_row and wgmma_col.
int row_of(int t, int i) { return t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8; }
int column_of(int t, int i) { return i / 4 * 8 + t % 4 * 2 + i % 2; }

// c[64, n] = (onto ? c : 0) + a b^T. Pairs of k from the last to the first, then onto c: an order that mma does not have, and symmetric in
// a and b, as one H200 showed that wgmma with its operands swapped gives the same bits.
void multiply(float (*c)[256], const float (*a)[16], const float (*b)[16], int n, bool onto) {
  float columns[16][256];
  for (int j = 0; j < n; ++j) {
    for (int k = 0; k < 16; ++k) columns[k][j] = b[j][k];
  }
  for (int i = 0; i < 64; ++i) {
    float sum[256] = {};
    for (int k = 14; k >= 0; k -= 2) {
      for (int j = 0; j < n; ++j) sum[j] = sum[j] + std::fma(a[i][k + 1], columns[k + 1][j], a[i][k] * columns[k][j]);
    }
    for (int j = 0; j < n; ++j) c[i][j] = onto ? c[i][j] + sum[j] : sum[j];
  }
}

struct ProductWait {
  Fiber* fiber;
  size_t groups;
};

// What all 128 threads have issued must be the same; the oldest groups are computed, all but `groups`.
void finish_products(void* const* lanes) {
  const auto& first = *static_cast<const ProductWait*>(lanes[0]);
  const Async& expected = current().worker->issued(*first.fiber);
  for (int t = 1; t < kWarpgroup; ++t) {
    const auto& lane = *static_cast<const ProductWait*>(lanes[t]);
    const Async& async = current().worker->issued(*lane.fiber);
    const bool agree =
        lane.groups == first.groups && async.product_groups == expected.product_groups &&
        std::equal(async.products.begin(), async.products.end(), expected.products.begin(), expected.products.end(),
                   [](const Product& x, const Product& y) { return x.n == y.n && x.a == y.a && x.b == y.b && x.onto == y.onto; });
    if (!agree) fault("divergence: threads %u and %u of a warpgroup issued different products", first.fiber->index.x, lane.fiber->index.x);
  }
  if (expected.product_groups.size() <= first.groups) return;
  const size_t finished = expected.product_groups.size() - first.groups;
  size_t count = 0;
  for (size_t g = 0; g < finished; ++g) count += expected.product_groups[g];

  Worker& w = *current().worker;
  if (w.tile == nullptr) w.tile = std::make_unique<Worker::Tile>();
  Worker::Tile& tile = *w.tile;
  for (size_t i = 0; i < count; ++i) {
    const Product& product = expected.products[i];
    const uint64_t now = digest(product, false);
    for (int t = 0; t < kWarpgroup; t += kTeam) {
      const Fiber& f = *static_cast<const ProductWait*>(lanes[t])->fiber;
      if (f.async->products[i].digest != now) {
        fault("wgmma: the operands of product %zu that thread %u waits for changed while it was in flight", i, f.index.x);
      }
    }
    read_operand(tile.a, product.a, 64);
    read_operand(tile.b, product.b, product.n);
    const auto for_each = [&](auto&& visit) {
      for (int t = 0; t < kWarpgroup; ++t) {
        Async& async = *static_cast<const ProductWait*>(lanes[t])->fiber->async;
        Sums& sums = sums_of(async, async.products[i].c);
        for (int e = 0; e < sums.count; ++e) visit(sums.values[e], tile.c[row_of(t, e)][column_of(t, e)]);
      }
    };
    const bool loaded = i > 0 && expected.products[i - 1].c == product.c && expected.products[i - 1].n == product.n;
    if (!loaded) for_each([](float& value, float& c) { c = value; });
    multiply(tile.c, tile.a, tile.b, product.n, product.onto);
    const bool goes_on = i + 1 < count && expected.products[i + 1].c == product.c && expected.products[i + 1].n == product.n;
    if (!goes_on) for_each([](float& value, float& c) { value = c; });
  }

  for (int t = 0; t < kWarpgroup; ++t) {
    const Fiber& f = *static_cast<const ProductWait*>(lanes[t])->fiber;
    Async& async = *f.async;
    for (size_t i = 0; i < count; ++i) {
      Sums& sums = sums_of(async, async.products[i].c);
      if (--sums.in_flight > 0) continue;
      for (int e = 0; e < sums.count; ++e) {
        if (to_bits(sums.c[e]) != 0xffffffffu) fault("wgmma: sum %d of thread %u was written while products were in flight", e, f.index.x);
      }
      memcpy(sums.c, sums.values, sizeof(float) * static_cast<size_t>(sums.count));
      async.sums.erase(async.sums.begin() + (&sums - async.sums.data()));
    }
    async.products.erase(async.products.begin(), async.products.begin() + static_cast<std::ptrdiff_t>(count));
    async.product_groups.erase(async.product_groups.begin(), async.product_groups.begin() + static_cast<std::ptrdiff_t>(finished));
  }
}

}  // namespace

void wgmma(float* c, int n, uint64_t a, uint64_t b, bool onto) {
  Fiber& f = current();
  Async& async = f.worker->issued(f);
  if (f.worker->threads / kWarpgroup <= static_cast<int>(f.index.x) / kWarpgroup) fault("wgmma: it is in no warpgroup of 128 threads");
  const auto found = std::find_if(async.sums.begin(), async.sums.end(), [c](const Sums& s) { return s.c == c; });
  if (found != async.sums.end()) {
    if (found->count != n / 2) fault("wgmma: the same sums with another shape while products are in flight");
    ++found->in_flight;
  } else {
    if (!async.fenced) fault("wgmma: no wgmma_fence() since its sums were last free");
    Sums& sums = async.sums.emplace_back();
    sums.c = c;
    sums.count = n / 2;
    sums.in_flight = 1;
    memcpy(sums.values, c, sizeof(float) * static_cast<size_t>(n / 2));
    memset(c, kPoison, sizeof(float) * static_cast<size_t>(n / 2));
  }
  Product product{c, n, a, b, onto, 0};
  if (f.index.x % kTeam == 0) product.digest = digest(product, true);
  async.products.push_back(product);
}

void wgmma_wait(int groups, const Site& site) {
  Fiber& f = current();
  const int warpgroup = static_cast<int>(f.index.x) / kWarpgroup;
  if (f.worker->threads / kWarpgroup <= warpgroup) fault("wgmma_wait: it is in no warpgroup of 128 threads");
  ProductWait mine{&f, static_cast<size_t>(groups)};
  meet(f.worker->warpgroups[warpgroup], warpgroup * kWarpgroup, kWarpgroup, "wgmma_wait", site, finish_products, &mine, true);
  f.worker->issued(f).fenced = false;
}

}  // namespace simt

// ---- The names of hopper.h ------------------------------------------------------------------------------------------------------------

using namespace simt;

TensorMap tensor_map(const char* name, const void* base, int64_t rows, int64_t columns, int64_t row_stride, int box_rows, int box_columns) {
  GLMX_CHECK(
      reinterpret_cast<uintptr_t>(base) % 16 == 0 && rows > 0 && columns > 0 && rows <= int64_t{1} << 32 && columns <= int64_t{1} << 32 &&
          row_stride % 8 == 0 && row_stride >= columns && box_columns == kRowBytes / 2 && box_rows > 0 && box_rows <= 256,
      name, ": no tensor map of a matrix of ", rows, " x ", columns, ", stride ", row_stride, ", box ", box_rows, " x ", box_columns);
  return {static_cast<const uint16_t*>(base), rows, columns, row_stride, box_rows, box_columns};
}

void tma_load(void* shared, const TensorMap* map, uint64_t* barrier, int column, int row) {
  Worker& w = *current().worker;
  const KnownMbarrier& k = known("tma_load", barrier);
  if (!k.fenced) fault("tma_load: thread %u has not called mbarrier_init_done() since it initialised the mbarrier", k.thread);
  const size_t bytes = static_cast<size_t>(map->box_rows) * kRowBytes;
  check_shared("tma_load", shared, bytes, kSwizzleBytes);
  if (!w.in_dynamic(shared, bytes)) fault("tma_load: %p is not dynamic shared memory", shared);
  memset(shared, kPoison, bytes);
  w.in_flight.push_back({barrier, static_cast<unsigned char*>(shared), *map, column, row, nullptr, {}});
}

void mbarrier_init(uint64_t* b, int arrivals) {
  Fiber& f = current();
  Worker& w = *f.worker;
  check_shared("mbarrier_init", b, 8, 8);
  if (arrivals < 1 || arrivals > 0xffff) fault("mbarrier_init: %d arrivals", arrivals);
  for (const KnownMbarrier& k : w.mbarriers) {
    if (k.at == b) fault("mbarrier_init: thread %u has already initialised it", k.thread);
  }
  if (!w.block.hopper) w.begin_hopper();
  w.mbarriers.push_back({b, f.index.x, false});
  const auto count = static_cast<uint32_t>(arrivals);
  const Phase phase{count & 0xffff, count & 0xffff, 0, 0};
  memcpy(b, &phase, 8);
}
void mbarrier_init_done() {
  Fiber& f = current();
  for (KnownMbarrier& k : f.worker->mbarriers) {
    if (k.thread == f.index.x) k.fenced = true;
  }
}
void mbarrier_expect(uint64_t* b, int bytes) {
  if (bytes < 0 || bytes >= 1 << 20) fault("mbarrier_expect: %d bytes are not in [0, 2^20)", bytes);
  arrive("mbarrier_expect", b, bytes);
}
void mbarrier_arrive(uint64_t* b) { arrive("mbarrier_arrive", b, 0); }
void mbarrier_wait(uint64_t* b, int parity, Site site) {
  known("mbarrier_wait", b);
  if (parity != 0 && parity != 1) fault("mbarrier_wait: parity %d", parity);
  if (static_cast<int>(phase_of(b).parity) != parity) return;
  Fiber& f = current();
  f.state = State::mbarrier;
  f.mbarrier = b;
  f.parity = parity;
  f.site = site;
  f.worker->yield(f);
}

void mbarrier_arrive_copies(uint64_t* b) {
  known("mbarrier_arrive_copies", b);
  Fiber& f = current();
  Async& async = f.worker->issued(f);
  f.worker->in_flight.push_back({b, nullptr, {}, 0, 0, &f, std::move(async.copies)});
  async.copies.clear();
  async.copy_groups.clear();
}

void fence_async() {
  Fiber& f = current();
  Async& async = f.worker->issued(f);
  async.fence_time = f.worker->time;
  for (const uint32_t unit : async.written) {
    Write& write = f.worker->writes[unit];
    if (write.thread == f.index.x) write.time = 0;
  }
  async.written.clear();
}

uint64_t operand(const void* shared) {
  Worker& w = *current().worker;
  if (!w.in_dynamic(shared, 16)) fault("operand: %p is not dynamic shared memory", shared);
  const uint32_t start = shared_address(w, shared);
  if (start % 16 != 0) fault("operand: %p is not aligned to 16 bytes", shared);
  return uint64_t{(start & 0x3ffff) >> 4} | uint64_t{1} << 16 | uint64_t{kSwizzleBytes >> 4} << 32 | uint64_t{1} << 62;
}
void wgmma_fence() {
  Fiber& f = current();
  f.worker->issued(f).fenced = true;
}
void wgmma_commit() {
  Fiber& f = current();
  Async& async = f.worker->issued(f);
  size_t grouped = 0;
  for (const size_t n : async.product_groups) grouped += n;
  async.product_groups.push_back(async.products.size() - grouped);
}

}  // namespace gx
