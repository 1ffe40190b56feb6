// Products of bfloat16 on AMX's tile registers; included by tiles.inc.h inside its namespace.
//
// Eight registers of 16 rows of 64 bytes: 2 x 2 blocks of sums (0 to 3), two of the left operand (4 and 5: 16 rows, 32
// inner indices), two of a strip (6 and 7: 16 terms, 16 columns). So four loads serve four products. Rows and columns
// at the edge are left out by configuration, so nothing outside an operand is read or written; inner sizes are padded.

constexpr std::int64_t kTileRows = 16, kTileTerms = 16, kTileBytes = 64, kBlock = 2 * kTileRows;
static_assert(kBlock == kLanes<float>, "a block is as wide as a strip");

// By hand: gcc's intrinsics take a literal register number alone, and hide from the compiler what memory they read.
template <int tile>
DK_FN void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
template <int tile>
DK_FN void tile_load(const void* from, std::int64_t stride) {  // in bytes
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
DK_FN void tile_store(void* to, std::int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
}
template <int sum, int left, int right>
DK_FN void tile_multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(left), "i"(right));
}

struct TileConfiguration {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t bytes[16] = {};  // of a row
  std::uint8_t rows[16] = {};
};

// For sums of `rows` by `columns`, each at most a block; what such sums leave unused has no size.
inline void configure_tiles(std::int64_t rows, std::int64_t columns) {
  TileConfiguration to;
  const auto size = [&](int tile, std::int64_t tile_rows, std::int64_t bytes) {
    if (tile_rows <= 0 || bytes <= 0) return;
    to.rows[tile] = static_cast<std::uint8_t>(tile_rows);
    to.bytes[tile] = static_cast<std::uint16_t>(bytes);
  };
  for (int half = 0; half < 2; ++half) {
    const std::int64_t height = least(kTileRows, rows - half * kTileRows);
    const std::int64_t width = 4 * least(kTileRows, columns - half * kTileRows);
    for (int other = 0; other < 2; ++other) {
      size(2 * half + other, height, 4 * least(kTileRows, columns - other * kTileRows));
    }
    size(4 + half, height, kTileBytes);
    size(6 + half, kTileTerms, width);
  }
  asm volatile("ldtilecfg %0" ::"m"(to));
}

// out (+)= a * strip for `tall` by `wide` registers of sums, as configured; strides in numbers.
template <int tall, int wide>
DK_FN void micro(std::int64_t steps, const BFloat16* a, std::int64_t lda, const BFloat16* strip, float* out,
                 std::int64_t ldo, bool add) {
  const std::int64_t a_stride = lda * 2, strip_stride = kLanes<float> * 4, out_stride = ldo * 4;
  const auto each_sum = [&](auto f) {
    f(Count<0>{}, out);
    if constexpr (wide > 1) f(Count<1>{}, out + kTileRows);
    if constexpr (tall > 1) f(Count<2>{}, out + kTileRows * ldo);
    if constexpr (tall > 1 && wide > 1) f(Count<3>{}, out + kTileRows * ldo + kTileRows);
  };
  each_sum([&](auto sum, float* at) {
    constexpr int tile = decltype(sum)::value;
    add ? tile_load<tile>(at, out_stride) : tile_zero<tile>();
  });
  for (std::int64_t step = 0; step < steps; ++step) {
    tile_load<6>(strip, strip_stride);
    tile_load<4>(a, a_stride);
    tile_multiply_add<0, 4, 6>();
    if constexpr (wide > 1) {
      tile_load<7>(strip + kTileBytes / 2, strip_stride);
      tile_multiply_add<1, 4, 7>();
    }
    if constexpr (tall > 1) {
      tile_load<5>(a + kTileRows * lda, a_stride);
      tile_multiply_add<2, 5, 6>();
      if constexpr (wide > 1) tile_multiply_add<3, 5, 7>();
    }
    a += 2 * kTileTerms;
    strip += 2 * kTileTerms * kLanes<float>;
  }
  each_sum([&](auto sum, float* at) { tile_store<decltype(sum)::value>(at, out_stride); });
}

// As the other product; a left operand is read by rows, whatever it holds.
template <bool>
void product(std::int64_t rows, std::int64_t columns, std::int64_t inner, const BFloat16* a, std::int64_t lda,
             const BFloat16* strip, float* out, std::int64_t ldo, bool add) {
  const auto block = [&](auto tall, std::int64_t i) {
    constexpr int n = decltype(tall)::value;
    const BFloat16* from = a + i * lda;
    if (columns > kTileRows) return micro<n, 2>(inner / kTileTerms, from, lda, strip, out + i * ldo, ldo, add);
    micro<n, 1>(inner / kTileTerms, from, lda, strip, out + i * ldo, ldo, add);
  };
  const std::int64_t whole = rows / kBlock * kBlock, rest = rows - whole;
  if (whole && columns < kBlock) configure_tiles(kBlock, columns);
  for (std::int64_t i = 0; i < whole; i += kBlock) block(Count<2>{}, i);
  if (rest) {
    configure_tiles(rest, columns);
    rest > kTileRows ? block(Count<2>{}, whole) : block(Count<1>{}, whole);
  }
  if (rest || columns < kBlock) configure_tiles(kBlock, kBlock);
}

// While a thread has one, its tile registers are those of whole blocks. They are released at the end of every call:
// live ones make a switch of threads slower, and gain nothing, as others that use AMX configure for themselves.
template <>
struct Registers<float, BFloat16> {
  Registers() { configure_tiles(kBlock, kBlock); }
  ~Registers() { asm volatile("tilerelease"); }
};
