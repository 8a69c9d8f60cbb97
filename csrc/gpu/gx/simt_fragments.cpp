// Matrix fragments on the CPU that plays GPU: PTX's layouts of ldmatrix and mma.m16n8k16, lane by lane.
#include "gpu/gx/gx.h"

namespace gx {
namespace {
struct MatrixLane {
  const void* row;
  uint32_t* out;
};
// Lane 8 j + i brings row i of the 8 x 8 matrix j; every lane takes two neighbouring elements of a row (or of a column) of each matrix.
template <bool kTransposed>
void move_matrices(void* const* lanes) {
  uint16_t m[4][8][8];
  for (int i = 0; i < kTeam; ++i) memcpy(m[i / 8][i % 8], static_cast<MatrixLane*>(lanes[i])->row, 16);
  for (int i = 0; i < kTeam; ++i) {
    const int row = i / 4, col = i % 4 * 2;
    for (int j = 0; j < 4; ++j) {
      const uint32_t first = kTransposed ? m[j][col][row] : m[j][row][col];
      const uint32_t second = kTransposed ? m[j][col + 1][row] : m[j][row][col + 1];
      static_cast<MatrixLane*>(lanes[i])->out[j] = first | second << 16;
    }
  }
}
struct MmaLane {
  float* c;
  const uint32_t *a, *b;
};
float widen(uint32_t half) {
  const uint32_t bits = half << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
void multiply(void* const* lanes) {
  float a[16][16], b[16][8], c[16][8];  // a [m][k], b [k][n]
  for (int i = 0; i < kTeam; ++i) {
    const MmaLane& lane = *static_cast<const MmaLane*>(lanes[i]);
    const int row = i / 4, col = i % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      const int shift = half * 16;
      for (int r = 0; r < 4; ++r) a[row + r % 2 * 8][col + r / 2 * 8 + half] = widen(lane.a[r] >> shift & 0xffff);
      for (int r = 0; r < 2; ++r) b[col + r * 8 + half][row] = widen(lane.b[r] >> shift & 0xffff);
      for (int r = 0; r < 2; ++r) c[row + r * 8][col + half] = lane.c[r * 2 + half];
    }
  }
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 8; ++n) c[m][n] = std::fma(a[m][k], b[k][n], c[m][n]);
    }
  }
  for (int i = 0; i < kTeam; ++i) {
    for (int r = 0; r < 4; ++r) static_cast<const MmaLane*>(lanes[i])->c[r] = c[i / 4 + r / 2 * 8][i % 4 * 2 + r % 2];
  }
}
}  // namespace

void load_matrices(uint32_t (&r)[4], const void* p, const simt::Site& site) {
  simt::check_shared("ldmatrix", p, 16, 16);
  MatrixLane mine{p, r};
  simt::collective("ldmatrix", site, move_matrices<false>, &mine);
}
void load_matrices_transposed(uint32_t (&r)[4], const void* p, const simt::Site& site) {
  simt::check_shared("ldmatrix.trans", p, 16, 16);
  MatrixLane mine{p, r};
  simt::collective("ldmatrix.trans", site, move_matrices<true>, &mine);
}
void mma(FragC& c, const FragA& a, const FragB& b, simt::Site site) {
  MmaLane mine{c.v, a.r, b.r};
  simt::collective("mma", site, multiply, &mine);
}

}  // namespace gx
