// matmul: a matrix product by torch's own cuBLASLt, with the algorithm that is the fastest here.
//
// cuBLASLt proposes several algorithms for a product, in the order of a model it has of the card. The first,
// which is what torch takes, needs up to a third more time than the best: least where the output is bf16,
// most where it is an fp32 sum. So the third call of each shape times them, on a scratch output, and later
// ones take the winner.
#include <array>
#include <limits>
#include <map>
#include <mutex>

#include "common.h"
#include "cublaslt.h"

namespace openllama {
namespace {

#ifdef USE_CUDA

namespace lt = cublaslt;

constexpr size_t kWorkspaceBytes = 32 << 20;  // at most
constexpr uint32_t kInFp32 =
    2;  // CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE: parts of a sum are not rounded first
constexpr int kProposals = 8;
constexpr int kRounds = 7;
constexpr int kMostTimed = 512;  // shapes: a run whose lengths vary must not time all its life
constexpr size_t kMostPlans = 4096;
constexpr int kUntimed = 2;     // calls of a shape before it is worth to time it
constexpr float kGain = 0.99f;  // of the first proposal's time: what is closer to it is noise

// One matrix as cuBLASLt sees it: columns side by side, or their transpose.
struct View {
  int64_t ld;
  bool transposed;
};

// Row-major (rows, columns) is the transpose in cuBLASLt's eyes, which is what the product below wants.
View view_of(const Tensor& t, const char* name) {
  require(t.dim() == 2, "openllama: ", name, " must have two dimensions");
  const int64_t rows = t.size(0),
                columns = t.size(1);  // a stride counts where there is more than one of them
  if ((columns == 1 || t.stride(1) == 1) && (rows == 1 || t.stride(0) >= columns))
    return {std::max(rows == 1 ? 1 : t.stride(0), columns), false};
  require((rows == 1 || t.stride(0) == 1) && (columns == 1 || t.stride(1) >= rows), "openllama: ", name,
          " must have contiguous rows or columns");
  return {std::max(columns == 1 ? 1 : t.stride(1), rows), true};
}

int32_t type_of(const Tensor& t) {
  const Dtype dtype = dtype_of(t);
  return dtype == Dtype::f32 ? lt::kF32 : dtype == Dtype::bf16 ? lt::kBF16 : lt::kF16;
}

int64_t alignment(const void* p) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  return std::min<int64_t>(256, static_cast<int64_t>(address & -address));
}

void check_lt(int32_t status, const char* call) {
  require(status == 0, "openllama: matmul: cublasLt", call, " failed with status ", status);
}

// The order of fields is that of the key, below.
struct Problem {
  int64_t device, m, n, k, lda, ldb, ldout, type, out_type, transpose_a, transpose_b, align_a, align_b,
      align_out;
  auto operator<=>(const Problem&) const = default;
};

// Descriptors and the chosen algorithm of a problem.
struct Plan {
  lt::Object desc, a, b, out;
  lt::Proposal chosen;
};

struct Operands {
  const void *a, *b;
  void* out;
  bool
      accumulate;  // no part of the problem: a step's first sum, which starts anew, is made as the others are
};

lt::Handle handle_of(int64_t device) {  // the caller holds the lock, and has set the device
  static std::map<int64_t, lt::Handle> handles;
  auto& handle = handles[device];
  if (!handle) check_lt(lt::library().create(&handle), "Create");
  return handle;
}

int32_t launch(lt::Handle handle, const Plan& plan, const Operands& o, const lt::Proposal& with,
               void* workspace, cudaStream_t stream) {
  const float one = 1.0f, beta = o.accumulate ? 1.0f : 0.0f;
  // out^T = b^T a^T, as columns: so b comes first
  return lt::library().matmul(handle, plan.desc, &one, o.b, plan.b, o.a, plan.a, &beta, o.out, plan.out,
                              o.out, plan.out, &with.algorithm, workspace, with.workspace_bytes, stream);
}

std::vector<lt::Proposal> proposals(lt::Handle handle, const Plan& plan, const Problem& p) {
  const auto& l = lt::library();
  lt::Object preference;
  check_lt(l.preference_create(&preference), "MatmulPreferenceCreate");
  l.preference_set(preference, lt::kReductionSchemes, &kInFp32, sizeof kInFp32);
  l.preference_set(preference, lt::kMaxWorkspaceBytes, &kWorkspaceBytes, sizeof kWorkspaceBytes);
  const std::array<uint32_t, 4> aligned{uint32_t(p.align_b), uint32_t(p.align_a), uint32_t(p.align_out),
                                        uint32_t(p.align_out)};
  for (int32_t i = 0; i < 4; ++i)
    l.preference_set(preference, lt::kMinAlignmentA + i, &aligned[i], sizeof aligned[i]);
  std::vector<lt::Proposal> found(kProposals);
  int32_t count = 0;
  const int32_t status = l.propose(handle, plan.desc, plan.b, plan.a, plan.out, plan.out, preference,
                                   kProposals, found.data(), &count);
  l.preference_destroy(preference);
  found.resize(status == 0 ? count : 0);
  std::erase_if(found, [](const lt::Proposal& one) { return one.status != 0; });
  require(!found.empty(), "openllama: matmul: cuBLASLt has no algorithm for this product");
  return found;
}

Plan described(const Problem& p) {
  const auto& l = lt::library();
  Plan plan{};
  check_lt(l.desc_create(&plan.desc, lt::kComputeF32, lt::kF32), "MatmulDescCreate");
  const int32_t op_b = p.transpose_b ? lt::kOpT : lt::kOpN, op_a = p.transpose_a ? lt::kOpT : lt::kOpN;
  l.desc_set(plan.desc, lt::kTransA, &op_b, sizeof op_b);
  l.desc_set(plan.desc, lt::kTransB, &op_a, sizeof op_a);
  const auto layout = [&](lt::Object* to, int64_t type, int64_t rows, int64_t columns, int64_t ld) {
    check_lt(l.layout_create(to, int32_t(type), uint64_t(rows), uint64_t(columns), ld), "MatrixLayoutCreate");
  };
  layout(&plan.b, p.type, p.transpose_b ? p.k : p.n, p.transpose_b ? p.n : p.k, p.ldb);
  layout(&plan.a, p.type, p.transpose_a ? p.m : p.k, p.transpose_a ? p.k : p.m, p.lda);
  layout(&plan.out, p.out_type, p.n, p.m, p.ldout);
  return plan;
}

struct Timer {
  cudaEvent_t begin = nullptr, end = nullptr;

  Timer() {
    check(cudaEventCreate(&begin), "matmul");
    check(cudaEventCreate(&end), "matmul");
  }
  ~Timer() {
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
  }
};

// Which proposal is the fastest, on an output of its own: a sum must not grow by being timed. They take
// turns, so that all meet the same clock: a large product draws all the power that the card may take, which
// lowers it. One that can't run after all loses.
size_t fastest(lt::Handle handle, const Plan& plan, const Problem& p, Operands o, const Tensor& out,
               const std::vector<lt::Proposal>& all, cudaStream_t stream) {
  std::optional<Tensor> scratch, workspace;
  try {
    scratch = torch::stable::new_empty(out, {p.m, p.ldout});
    workspace = torch::stable::new_empty(out, {int64_t(kWorkspaceBytes)}, ScalarType::Byte);
  } catch (const std::exception&) {  // no memory: training goes on with the first
    return 0;
  }
  o.out = scratch->mutable_data_ptr();
  const Timer timer;
  std::vector<std::array<float, kRounds>> times(all.size());
  for (int round = -1; round < kRounds; ++round)  // the first warms up
    for (size_t i = 0; i < all.size(); ++i) {
      check(cudaEventRecord(timer.begin, stream), "matmul");
      const bool ran = launch(handle, plan, o, all[i], workspace->mutable_data_ptr(), stream) == 0;
      check(cudaEventRecord(timer.end, stream), "matmul");
      check(cudaEventSynchronize(timer.end), "matmul");
      if (round < 0) continue;
      check(cudaEventElapsedTime(&times[i][round], timer.begin, timer.end), "matmul");
      if (!ran) times[i][round] = std::numeric_limits<float>::infinity();
    }
  const auto median = [](std::array<float, kRounds> of_one) {
    std::nth_element(of_one.begin(), of_one.begin() + kRounds / 2, of_one.end());
    return of_one[kRounds / 2];
  };
  const auto best = std::min_element(times.begin(), times.end(),
                                     [&](const auto& x, const auto& y) { return median(x) < median(y); });
  return median(*best) < kGain * median(times[0]) ? size_t(best - times.begin()) : 0;
}

struct Entry {
  Plan plan;
  int calls = 0;
};

// All plans; the lock is held while one is in use.
struct Plans {
  std::mutex mutex;
  std::map<std::pair<Problem, bool>, Entry> entries;
  int timed = 0;

  void make_room() {
    if (entries.size() < kMostPlans) return;
    for (const auto& [key, entry] : entries) {
      for (lt::Object layout : {entry.plan.a, entry.plan.b, entry.plan.out})
        lt::library().layout_destroy(layout);
      lt::library().desc_destroy(entry.plan.desc);
    }
    entries.clear();
  }
};

Plans& plans() {
  static Plans all;
  return all;
}

// The plan of a problem. Without `tune` it stays the first proposal, which is the same in every run.
const Plan& plan_of(lt::Handle handle, const Problem& p, const Operands& o, const Tensor& out, bool tune,
                    cudaStream_t stream) {
  auto found = plans().entries.find({p, tune});
  if (found == plans().entries.end()) {
    Plan plan = described(p);
    plan.chosen = proposals(handle, plan, p)[0];
    plans().make_room();
    found = plans().entries.emplace(std::pair{p, tune}, Entry{plan}).first;
  }
  Entry& entry = found->second;
  if (!tune || entry.calls > kUntimed || plans().timed >= kMostTimed) return entry.plan;
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &capturing), "matmul");
  if (capturing != cudaStreamCaptureStatusNone || entry.calls++ < kUntimed) return entry.plan;
  ++plans().timed;
  const auto all = proposals(handle, entry.plan, p);
  entry.plan.chosen = all[fastest(handle, entry.plan, p, o, out, all, stream)];
  return entry.plan;
}

// out (m, n) = a (m, k) @ b (k, n), or += where it accumulates.
void matmul_cuda(Tensor out, Tensor a, Tensor b, bool accumulate, bool tune) {
  require(lt::library().loaded, "openllama: matmul: torch has no cuBLASLt loaded");
  const CudaScope scope(out);
  check_device(a, "a", out);
  check_device(b, "b", out);
  require(a.scalar_type() == b.scalar_type() &&
              (out.scalar_type() == a.scalar_type() || out.scalar_type() == ScalarType::Float),
          "openllama: matmul takes a and b of one dtype, and out in theirs or fp32");
  const View va = view_of(a, "a"), vb = view_of(b, "b"), vout = view_of(out, "out");
  const int64_t m = a.size(0), n = b.size(1), k = a.size(1);
  require(b.size(0) == k && out.size(0) == m && out.size(1) == n && !vout.transposed && m && n && k,
          "openllama: matmul takes (m, k), (k, n) and a row-major (m, n), none empty");
  const Operands o{a.const_data_ptr(), b.const_data_ptr(), out.mutable_data_ptr(), accumulate};
  const Problem p{cuda_index(out),
                  m,
                  n,
                  k,
                  va.ld,
                  vb.ld,
                  vout.ld,
                  type_of(a),
                  type_of(out),
                  va.transposed,
                  vb.transposed,
                  alignment(o.a),
                  alignment(o.b),
                  alignment(o.out)};
  const std::lock_guard lock(plans().mutex);
  lt::Handle handle = handle_of(p.device);
  const Plan& plan = plan_of(handle, p, o, out, tune, scope.stream);
  const auto bytes = static_cast<int64_t>(plan.chosen.workspace_bytes);
  void* workspace = nullptr;
  std::optional<Tensor> room;
  if (bytes)
    workspace = room.emplace(torch::stable::new_empty(out, {bytes}, ScalarType::Byte)).mutable_data_ptr();
  check_lt(launch(handle, plan, o, plan.chosen, workspace, scope.stream), "Matmul");
}

#endif

// Whether torch has loaded the library that the products run on.
bool has_cublaslt() {
#ifdef USE_CUDA
  return cublaslt::library().loaded;
#else
  return false;
#endif
}

}  // namespace
}  // namespace openllama

STABLE_TORCH_LIBRARY_FRAGMENT(openllama, m) {
  m.def("has_cublaslt() -> bool");
  m.def("matmul_(Tensor(a!) out, Tensor a, Tensor b, bool accumulate, bool tune) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(openllama, CompositeExplicitAutograd, m) {
  m.impl("has_cublaslt", TORCH_BOX(&openllama::has_cublaslt));
}

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(openllama, CUDA, m) { m.impl("matmul_", TORCH_BOX(&openllama::matmul_cuda)); }
#endif
