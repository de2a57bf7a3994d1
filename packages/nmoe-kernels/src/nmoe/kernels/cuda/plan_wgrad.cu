// What grouped_wgrad_sm90.cu computes, and in which order: experts with the most rows first, so that none of them is left
// to the end, and those with more rows than a block can do in its share of the time in pieces. The sum over an expert's
// rows is the pieces' sum in their order.
//
// Pieces follow from the experts' rows and the size of the product, not from tiles or the GPU: neither changes a bit.
//
// A plan is entries of 16 bytes. The first holds the number of those that follow, and each of these an expert, a first row,
// the number of rows (0: the expert has none, and its gradient is zero), and 2 * (its earlier pieces) + (1 where another
// follows). A warp finds the place of an expert's: after those of all experts with larger pieces.
//
// Compile-time choices (-D):
//   ROWS    pieces are multiples of so many rows
//   LEAST   rows below which an expert is not cut
//   SHARES  an expert is cut where a block of this many, each with as much work as any other, would not finish it

struct Params {
  const int* offset;  // (E + 1): first rows of the experts
  int4* plan;
  unsigned* turn;  // (n_turns), set to 0
  int n_experts;
  int n_tiles;  // blocks that work on an expert at a time
  int n_turns;
};

namespace {

constexpr unsigned FULL = 0xffffffffu;

// Rows of each of an expert's pieces but the last.
__device__ __forceinline__ int piece_of(int rows, int most) {
  if (rows <= most) return rows;
  const int pieces = (rows - 1) / most + 1;
  return ((rows - 1) / pieces + ROWS) / ROWS * ROWS;
}

__device__ __forceinline__ int pieces_of(int rows, int piece) { return rows == piece ? 1 : (rows - 1) / piece + 1; }

}  // namespace

extern "C" __global__ void __launch_bounds__(1024) plan_wgrad(const __grid_constant__ Params p) {
  const int thread = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % 32, expert = thread / 32;
  for (int i = thread; i < p.n_turns; i += gridDim.x * blockDim.x) p.turn[i] = 0;
  if (expert >= p.n_experts) return;

  const long long share = (static_cast<long long>(p.offset[p.n_experts]) * p.n_tiles + SHARES - 1) / SHARES;
  const int most = share < LEAST ? LEAST : share > 0x7fffffff - ROWS ? 0x7fffffff - ROWS : static_cast<int>(share);
  const int first = p.offset[expert], rows = p.offset[expert + 1] - first, piece = piece_of(rows, most);
  int before = 0, all = 0;
  for (int e = lane; e < p.n_experts; e += 32) {
    const int its_rows = p.offset[e + 1] - p.offset[e], its_piece = piece_of(its_rows, most);
    const int its_pieces = pieces_of(its_rows, its_piece);
    all += its_pieces;
    if (its_piece > piece || (its_piece == piece && e < expert)) before += its_pieces;
  }
  before = __reduce_add_sync(FULL, before);
  all = __reduce_add_sync(FULL, all);
  if (thread == 0) p.plan[0] = make_int4(all, 0, 0, 0);
  const int pieces = pieces_of(rows, piece);
  for (int i = lane; i < pieces; i += 32) {
    const int here = i + 1 < pieces ? piece : rows - i * piece;
    p.plan[1 + before + i] = make_int4(expert, first + i * piece, here, 2 * i + (i + 1 < pieces));
  }
}
