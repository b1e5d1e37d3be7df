/* A CPU's pass in float32: products, and decoder layers as a whole. target/native_layers.py calls this.

   A row's numbers depend on that row alone, and on the order of what it reads: not on other rows, on threads, or on
   gaps between the slots that it reads. Every sum has one order, written out here, which the compiler may not change
   (no -ffast-math, and -ffp-contract=off). Sizes and strides are in numbers; the last dimension has no gaps.

   Weights of 8 bits are multiplied as whole numbers: a row of inputs is rounded to 16 bits and a scale. PART products
   are added exactly in 32 bits; these parts are added in float32, in their order. One instruction adds twice as many
   such products as of float32. */

#include <stdlib.h>

#include "lanes.h"

enum { WIDTH = 2 * LANES, ROWS = 6 }; /* outputs of a panel; rows of a block, at most */
enum Kind { FLOAT32, BFLOAT16, FLOAT16, INT8 };
enum { LARGEST = 32767, PART = 512 }; /* of a rounded row; inputs added in 32 bits: PART * 127 * LARGEST < 2^31 */

/* Halves: the bits of LANES bfloat16 or float16. Bytes, Pairs: LANES pairs, of 8 and 16 bits. Shorts: LANES of 16. */
typedef uint16_t Halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef int8_t Bytes __attribute__((vector_size(LANES * 2), aligned(1), may_alias));
typedef int16_t Pairs __attribute__((vector_size(LANES * 4), aligned(2), may_alias));
typedef int16_t Shorts __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

/* Weights [outputs, inputs] as panels of WIDTH outputs: [panels, inputs, WIDTH]. INT8 weights lie in pairs of inputs,
   [panels, pairs, WIDTH, 2], and have a scale [outputs]. Panels and pairs are filled up with zeros. The bias [outputs]
   may be NULL. */
typedef struct {
    const void *panels;
    const float *scale, *bias;
    int64_t inputs, outputs, kind;
} Product;

/* An RMS norm; without a weight there is none. */
typedef struct {
    const float *weight;
    float eps;
} Norm;

/* A decoder layer. One with an embedding_norm reads [norm(embedding); norm(state)], as an EAGLE-3 draft's first does.
   heads_norm [heads + key_heads, dim] is for queries, then keys. */
typedef struct {
    Product queries_keys_values, attention_output, gate_up, down;
    Norm embedding_norm, input_norm, heads_norm, mlp_norm;
    int64_t heads, key_heads, dim;
} Layer;

/* What the layers of a pass share. Rows are batch * nodes; row r writes slot slots[r] of all seats' slots. */
typedef struct {
    const float *cos, *signed_sin; /* [rows, turned], or [positions, turned] with the rows' positions */
    const int64_t *slots, *positions;
    const uint8_t *visible; /* [batch, nodes, read] by strides: which of its seat's slots a node reads */
    int64_t batch_stride, node_stride;
    int64_t batch, nodes, turned, read, slots_per_seat;
    float *scratch;
    int64_t threads;
} Pass;

int64_t panel_width(void) { return WIDTH; }

INLINE int64_t num_bytes(int kind) { return kind == FLOAT32 ? 4 : 2; }

INLINE Lanes load(const char *weights, int64_t index, int kind) {
    if (kind == FLOAT32) return AT((const float *)weights + index);
    const void *halves = (const uint16_t *)weights + index;
#if defined(__AVX512F__)
    __m256i read = _mm256_loadu_si256(halves);
    return (Lanes)(kind == FLOAT16 ? _mm512_cvtph_ps(read) : (__m512)((Numbers)_mm512_cvtepu16_epi32(read) << 16));
#elif defined(__AVX2__) && defined(__F16C__)
    __m128i read = _mm_loadu_si128(halves);
    return (Lanes)(kind == FLOAT16 ? _mm256_cvtph_ps(read) : (__m256)((Numbers)_mm256_cvtepu16_epi32(read) << 16));
#else
    Numbers bits = __builtin_convertvector(*(const Halves *)halves, Numbers);
    if (kind == BFLOAT16) return (Lanes)(bits << 16);
    /* The exponent's bias is 112 less. Subnormal numbers come out right, too. */
    Lanes size = (Lanes)((bits & 0x7fff) << 13) * 0x1p112f;
    return (Lanes)((Numbers)size | ((bits & 0x8000) << 16));
#endif
}

/* What a product reads of its rows: numbers [rows, 2 * pairs] and scales [rows] if its weights are INT8, else
   x [rows, inputs]. */
typedef struct {
    const float *x;
    const int16_t *numbers;
    const float *scales;
} Rows;

INLINE int64_t num_pairs(int64_t inputs) { return (inputs + 1) / 2; }

/* The float32 numbers that the numbers and scales of rows take. */
INLINE int64_t rounded_size(int64_t rows, int64_t inputs) { return rows * (1 + num_pairs(inputs)); }

/* Rounds a row to whole numbers of at most LARGEST, with a 0 behind an odd number of inputs. Returns their scale: NaN if
   the row holds NaN or infinity. */
INLINE float round_row(const float *x, int64_t inputs, int16_t *numbers) {
    const Lanes rounder = all(ROUNDER);
    const int64_t whole = inputs / LANES * LANES;
    Lanes last = all(0), most = all(0), zeros = all(0);
    memcpy(&last, x + whole, (size_t)(inputs - whole) * sizeof *x);
    for (int64_t i = 0; i <= whole; i += LANES) {
        const Lanes read = i < whole ? AT(x + i) : last, size = choose(read < 0.0f, -read, read);
        most = choose(size > most, size, most);
        zeros += read * 0.0f; /* NaN for NaN and infinity */
    }
    const float largest = most_of(most);
    const float inverse = largest > 0 ? LARGEST / largest : 0;
    for (int64_t i = 0; i <= whole; i += LANES) {
        const Lanes read = i < whole ? AT(x + i) : last;
        const Numbers rounded = (Numbers)(read * inverse + rounder) - (Numbers)rounder;
        const Shorts narrow = __builtin_convertvector(rounded, Shorts);
        memcpy(numbers + i, &narrow, (size_t)(i < whole ? LANES : 2 * num_pairs(inputs) - whole) * sizeof *numbers);
    }
    return largest / LARGEST + total(zeros);
}

INLINE Pairs load_pairs(const int8_t *weights) {
#if defined(__AVX512BW__)
    return (Pairs)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const void *)weights));
#elif defined(__AVX2__) && !defined(__AVX512F__)
    return (Pairs)_mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)weights));
#else
    return __builtin_convertvector(*(const Bytes *)weights, Pairs);
#endif
}

/* The sums, plus what the two products of each pair are. */
INLINE Numbers add_products(Pairs a, Pairs b, Numbers sums) {
#if defined(__AVX512VNNI__)
    return (Numbers)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
    return sums + (Numbers)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__) && !defined(__AVX512F__)
    return sums + (Numbers)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    for (int i = 0; i < LANES; i++) sums[i] += a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
    return sums;
#endif
}

/* The bytes of a panel. */
INLINE int64_t panel_size(const Product *product, int kind) {
    return kind == INT8 ? num_pairs(product->inputs) * 2 * WIDTH : product->inputs * WIDTH * num_bytes(kind);
}

/* The next panel is fetched while the blocks of this one are multiplied. A block of `count` rows fetches count / num_rows
   of it: as many bytes as one step reads, in that share of its steps. If the first block fetched all of it, that block
   would wait for memory, and memory would be idle during the others. */
typedef struct {
    const char *next;
    int64_t num_rows, left; /* rows of all blocks; rows that steps have yet to multiply until the next fetch */
} Ahead;

INLINE void fetch_ahead(Ahead *ahead, int count, int64_t bytes) {
    if ((ahead->left -= count) > 0) return;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(ahead->next + i, 0, 2);
    ahead->next += bytes;
    ahead->left += ahead->num_rows;
}

/* Adds to sums: some rows times one panel of INT8. */
INLINE void sum_int8(const Product *product, int64_t panel, int count, Rows rows, Ahead ahead, Lanes sums[][2]) {
    const int64_t pairs = num_pairs(product->inputs);
    const int8_t *weights = (const int8_t *)product->panels + panel * panel_size(product, INT8);
    for (int64_t first = 0; first < pairs; first += PART / 2) {
        const int64_t end = pairs - first < PART / 2 ? pairs : first + PART / 2;
        Numbers part[ROWS][2];
        for (int r = 0; r < count; r++) part[r][0] = part[r][1] = (Numbers){};
        for (int64_t k = first; k < end; k++) {
            fetch_ahead(&ahead, count, 2 * WIDTH);
            const Pairs low = load_pairs(weights + k * 2 * WIDTH), high = load_pairs(weights + k * 2 * WIDTH + WIDTH);
            for (int r = 0; r < count; r++) {
                int32_t pair;
                memcpy(&pair, rows.numbers + 2 * (r * pairs + k), sizeof pair);
                const Pairs factor = (Pairs)(pair - (Numbers){});
                part[r][0] = add_products(low, factor, part[r][0]);
                part[r][1] = add_products(high, factor, part[r][1]);
            }
        }
        for (int r = 0; r < count; r++)
            for (int half = 0; half < 2; half++) sums[r][half] += __builtin_convertvector(part[r][half], Lanes);
    }
}

/* The same of a panel of FLOAT32, BFLOAT16 or FLOAT16. */
INLINE void sum_floats(const Product *product, int64_t panel, int kind, int count, Rows rows, Ahead ahead,
                       Lanes sums[][2]) {
    const int64_t inputs = product->inputs;
    const char *weights = (const char *)product->panels + panel * panel_size(product, kind);
    for (int64_t k = 0; k < inputs; k++) {
        fetch_ahead(&ahead, count, WIDTH * num_bytes(kind));
        Lanes low = load(weights, k * WIDTH, kind), high = load(weights, k * WIDTH + LANES, kind);
        for (int r = 0; r < count; r++) {
            Lanes factor = all(rows.x[r * inputs + k]);
            sums[r][0] = multiply_add(low, factor, sums[r][0]);
            sums[r][1] = multiply_add(high, factor, sums[r][1]);
        }
    }
}

/* Rows `first .. first + count - 1` of `num_rows`, times one panel, plus the bias and `added`, where there are any. */
INLINE void multiply_block(const Product *product, int64_t panel, int kind, int64_t first, int count, int64_t num_rows,
                           Rows rows, const float *added, float *out) {
    const int64_t inputs = product->inputs, outputs = product->outputs, left = outputs - panel * WIDTH,
                  width = left < WIDTH ? left : WIDTH, size = panel_size(product, kind);
    const Ahead ahead = {(const char *)product->panels + (panel + 1) * size + size * first / num_rows, num_rows, count};
    const float *scale = kind == INT8 ? product->scale + panel * WIDTH : NULL,
                *bias = product->bias ? product->bias + panel * WIDTH : NULL;
    Lanes sums[ROWS][2];
    for (int r = 0; r < count; r++) sums[r][0] = sums[r][1] = all(0);
    if (kind == INT8)
        sum_int8(product, panel, count, (Rows){.numbers = rows.numbers + first * 2 * num_pairs(inputs)}, ahead, sums);
    else
        sum_floats(product, panel, kind, count, (Rows){.x = rows.x + first * inputs}, ahead, sums);
    for (int64_t r = first; r < first + count; r++) {
        const int64_t place = r * outputs + panel * WIDTH;
        float line[WIDTH];
        memcpy(line, sums[r - first], sizeof line);
        if (scale)
            for (int64_t i = 0; i < width; i++) line[i] *= scale[i] * rows.scales[r];
        if (bias)
            for (int64_t i = 0; i < width; i++) line[i] += bias[i];
        if (added)
            for (int64_t i = 0; i < width; i++) line[i] += added[place + i];
        memcpy(out + place, line, (size_t)width * sizeof *line);
    }
}

INLINE void multiply_panel(const Product *product, int64_t panel, int kind, int64_t num_rows, Rows rows,
                           const float *added, float *out) {
    int64_t r = 0;
#define BLOCK_OF(count) multiply_block(product, panel, kind, r, count, num_rows, rows, added, out)
    for (; num_rows - r > 8 || num_rows - r == ROWS; r += ROWS) BLOCK_OF(ROWS);
    if (num_rows - r > ROWS) { /* 7 is 4 + 3, and 8 is 4 + 4: a block of one or two waits for each sum before it adds */
        BLOCK_OF(4);
        r += 4;
    }
    switch (num_rows - r) {
        case 1: BLOCK_OF(1); break;
        case 2: BLOCK_OF(2); break;
        case 3: BLOCK_OF(3); break;
        case 4: BLOCK_OF(4); break;
        case 5: BLOCK_OF(5); break;
    }
#undef BLOCK_OF
}

/* A function for each kind, so that the compiler knows the kind and the rows in the innermost loop. */
#define KIND_OF(name, kind) \
    static void name(const Product *product, int64_t panel, int64_t num_rows, Rows rows, const float *added, \
                     float *out) { \
        multiply_panel(product, panel, kind, num_rows, rows, added, out); \
    }
KIND_OF(multiply_float32, FLOAT32)
KIND_OF(multiply_bfloat16, BFLOAT16)
KIND_OF(multiply_float16, FLOAT16)
KIND_OF(multiply_int8, INT8)

/* x [num_rows, inputs] times the weights -> out [num_rows, outputs], by the threads of the region that it is called in.
   A thread takes some neighbouring panels at a time, since it fetches the next one ahead; a late thread takes fewer.
   Of scratch, rounded_size numbers are used where weights are INT8. */
static void share_product(const Product *product, int64_t num_rows, const float *x, const float *added, float *out,
                          float *scratch, int64_t threads) {
    const int64_t panels = (product->outputs + WIDTH - 1) / WIDTH, part = panels / (4 * threads) + 1,
                  inputs = product->inputs;
    int16_t *numbers = (int16_t *)(scratch + num_rows);
    if (product->kind == INT8) {
#pragma omp for
        for (int64_t row = 0; row < num_rows; row++)
            scratch[row] = round_row(x + row * inputs, inputs, numbers + row * 2 * num_pairs(inputs));
    }
    const Rows rows = {x, numbers, scratch};
#pragma omp for schedule(dynamic, part)
    for (int64_t panel = 0; panel < panels; panel++) switch (product->kind) {
            case FLOAT32: multiply_float32(product, panel, num_rows, rows, added, out); break;
            case BFLOAT16: multiply_bfloat16(product, panel, num_rows, rows, added, out); break;
            case FLOAT16: multiply_float16(product, panel, num_rows, rows, added, out); break;
            case INT8: multiply_int8(product, panel, num_rows, rows, added, out); break;
        }
}

/* Scratch of a product alone. */
static float *new_scratch(const Product *product, int64_t num_rows) {
    return product->kind == INT8 ? malloc((size_t)rounded_size(num_rows, product->inputs) * sizeof(float)) : NULL;
}

/* share_product, in a region of its own. */
void multiply(const Product *product, int64_t rows, const float *x, const float *added, float *out, int threads) {
    float *scratch = new_scratch(product, rows);
#pragma omp parallel num_threads(threads) if (threads > 1)
    share_product(product, rows, x, added, out, scratch, threads);
    free(scratch);
}

INLINE void normalise_row(const float *x, int64_t dim, const float *weight, float eps, float *out) {
    float scale = 1.0f / __builtin_sqrtf(dot(x, x, dim) / (float)dim + eps);
    for (int64_t i = 0; i < dim; i++) out[i] = x[i] * scale * weight[i];
}

/* RMS norm of x [rows, heads, dim], by weight [dim], or [heads, dim] with a weight_stride. */
void normalise(const float *x, int64_t row_stride, int64_t rows, int64_t heads, int64_t dim, const float *weight,
               int64_t weight_stride, float eps, float *out, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t head = 0; head < heads; head++)
            normalise_row(x + row * row_stride + head * dim, dim, weight + head * weight_stride, eps,
                          out + (row * heads + head) * dim);
}

/* What a row's first product reads. */
INLINE void read_row(const Layer *layer, const float *embedding, const float *x, int64_t size, float *inputs) {
    if (layer->embedding_norm.weight) {
        normalise_row(embedding, size, layer->embedding_norm.weight, layer->embedding_norm.eps, inputs);
        inputs += size;
    }
    if (layer->input_norm.weight)
        normalise_row(x, size, layer->input_norm.weight, layer->input_norm.eps, inputs);
    else
        memcpy(inputs, x, (size_t)size * sizeof *x);
}

/* Rotate the first `turned` of a head's numbers, in place: pairs are (i, i + turned / 2). */
INLINE void rotate(float *x, int64_t turned, const float *cos, const float *signed_sin) {
    const int64_t half = turned / 2;
    for (int64_t i = 0; i < half; i++) {
        float low = x[i], high = x[half + i];
        x[i] = low * cos[i] + high * signed_sin[i];
        x[half + i] = high * cos[half + i] + low * signed_sin[half + i];
    }
}

INLINE void gate_row(const float *gate_up, int64_t width, float *out) {
    const float *up = gate_up + width;
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES)
        AT(out + i) = AT(gate_up + i) / (exponential(-AT(gate_up + i)) + 1.0f) * AT(up + i);
    for (; i < width; i++) out[i] = gate_up[i] / (exponential(all(-gate_up[i]))[0] + 1.0f) * up[i];
}

enum { SLOTS = 4 }; /* whose keys a query is multiplied with at once */

/* A query times the keys of some slots, whose numbers are `visible`. */
INLINE void dots(const float *query, const float *keys, int64_t stride, int64_t dim, const int32_t *visible,
                 float *out) {
    Lanes sums[SLOTS] = {};
    int64_t i = 0;
    for (; i + LANES <= dim; i += LANES)
        for (int s = 0; s < SLOTS; s++)
            sums[s] = multiply_add(AT(query + i), AT(keys + visible[s] * stride + i), sums[s]);
    totals(sums, out);
    for (; i < dim; i++)
        for (int s = 0; s < SLOTS; s++) out[s] += query[i] * keys[visible[s] * stride + i];
}

/* Softmax weights of one query at the visible slots of a key head. */
INLINE void softmax(const float *query, const float *keys, int64_t stride, int64_t dim, float scale,
                    const int32_t *visible, int64_t count, float *weights) {
    Lanes sums = all(0), most = all(-INFINITY);
    int64_t j = 0;
    for (; j + SLOTS <= count; j += SLOTS) dots(query, keys, stride, dim, visible + j, weights + j);
    if (j < count) {
        int32_t slots[SLOTS];
        float found[SLOTS];
        for (int64_t s = 0; s < SLOTS; s++) slots[s] = visible[j + s < count ? j + s : j];
        dots(query, keys, stride, dim, slots, found);
        memcpy(weights + j, found, (size_t)(count - j) * sizeof *found);
    }
    for (j = 0; j < count; j++) weights[j] *= scale;
    for (j = 0; j + LANES <= count; j += LANES) most = choose(AT(weights + j) > most, AT(weights + j), most);
    float largest = most_of(most);
    for (; j < count; j++) largest = weights[j] > largest ? weights[j] : largest;
    for (j = 0; j + LANES <= count; j += LANES) sums += (AT(weights + j) = exponential(AT(weights + j) - largest));
    float sum = total(sums);
    for (; j < count; j++) sum += (weights[j] = exponential(all(weights[j] - largest))[0]);
    for (j = 0; j < count; j++) weights[j] /= sum;
}

/* `vectors` neighbouring vectors of the visible slots' values, summed by their weights. */
INLINE void weigh_vectors(const float *weights, const float *values, int64_t stride, int vectors,
                          const int32_t *visible, int64_t count, float *out) {
    Lanes sums[8];
    for (int b = 0; b < vectors; b++) sums[b] = all(0);
    for (int64_t j = 0; j < count; j++)
        for (int b = 0; b < vectors; b++)
            sums[b] = multiply_add(AT(values + visible[j] * stride + b * LANES), all(weights[j]), sums[b]);
    memcpy(out, sums, (size_t)vectors * sizeof *sums);
}

/* The visible slots' values, summed by their weights. */
INLINE void weigh(const float *weights, const float *values, int64_t stride, int64_t dim, const int32_t *visible,
                  int64_t count, float *out) {
    int64_t i = 0;
#define WEIGH(vectors) \
    for (; i + vectors * LANES <= dim; i += vectors * LANES) \
        weigh_vectors(weights, values + i, stride, vectors, visible, count, out + i)
    WEIGH(8);
    WEIGH(4);
    WEIGH(1);
#undef WEIGH
    for (; i < dim; i++) {
        out[i] = 0;
        for (int64_t j = 0; j < count; j++) out[i] += values[visible[j] * stride + i] * weights[j];
    }
}

INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* Scratch of one layer, in numbers: its arrays, then the rounded rows of one product. An fc, which runs before the
   layers, rounds its rows at the beginning: 2 * size inputs take less than the arrays do. */
INLINE int64_t scratch_of(const Layer *layer, int64_t rows, int64_t read, int64_t threads) {
    const int64_t attended = layer->heads * layer->dim, gated = layer->down.inputs,
                  size = layer->attention_output.outputs, inputs = layer->queries_keys_values.inputs;
    return rows * (inputs + layer->queries_keys_values.outputs + attended + size + 3 * gated) + 2 * threads * read +
           rounded_size(rows, larger(inputs, larger(attended, gated)));
}

/* Scratch of a pass over these rows, in numbers. */
int64_t scratch_size(const Layer *layers, int64_t count, int64_t rows, int64_t read, int64_t threads) {
    int64_t most = 0;
    for (int64_t i = 0; i < count; i++) most = larger(most, scratch_of(layers + i, rows, read, threads));
    return most;
}

/* A decoder layer, by the threads of the region that it is called in: its states x [rows, D], which become its output.
   Keys and values [slots of all seats, key_heads, dim] are written. */
static void run_layer(const Layer *layer, const Pass *pass, float *keys, float *values, const float *embedding,
                      float *x) {
    const int64_t rows = pass->batch * pass->nodes, dim = layer->dim, heads = layer->heads,
                  key_heads = layer->key_heads, groups = heads / key_heads, size = layer->attention_output.outputs,
                  width = layer->queries_keys_values.inputs, joined = layer->queries_keys_values.outputs,
                  gated = layer->down.inputs, slot = key_heads * dim;
    const float scale = 1.0f / __builtin_sqrtf((float)dim);
    /* inputs [rows, width], projected [rows, joined], attended [rows, heads * dim], normed [rows, size],
       gate_up [rows, 2 * gated], gates [rows, gated], own [threads, 2 * read], rounded: of one product at a time */
    float *inputs = pass->scratch, *projected = inputs + rows * width, *attended = projected + rows * joined,
          *normed = attended + rows * heads * dim, *gate_up = normed + rows * size,
          *gates = gate_up + rows * 2 * gated, *own = gates + rows * gated,
          *rounded = own + 2 * pass->threads * pass->read;
    float *weights = own + 2 * omp_get_thread_num() * pass->read;
    int32_t *visible = (int32_t *)(weights + pass->read);
#pragma omp for
    for (int64_t row = 0; row < rows; row++)
        read_row(layer, embedding ? embedding + row * size : NULL, x + row * size, size, inputs + row * width);
    share_product(&layer->queries_keys_values, rows, inputs, NULL, projected, rounded, pass->threads);
#pragma omp for
    for (int64_t row = 0; row < rows; row++) {
        float *row_heads = projected + row * joined;
        const int64_t angle = (pass->positions ? pass->positions[row] : row) * pass->turned;
        for (int64_t head = 0; head < heads + key_heads; head++) {
            float *part = row_heads + head * dim;
            if (layer->heads_norm.weight)
                normalise_row(part, dim, layer->heads_norm.weight + head * dim, layer->heads_norm.eps, part);
            rotate(part, pass->turned, pass->cos + angle, pass->signed_sin + angle);
        }
        memcpy(keys + pass->slots[row] * slot, row_heads + heads * dim, (size_t)slot * sizeof *keys);
        memcpy(values + pass->slots[row] * slot, row_heads + heads * dim + slot, (size_t)slot * sizeof *values);
    }
    /* By heads first: a head's keys and values fit into a cache that all heads' do not. */
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t h = 0; h < key_heads; h++)
        for (int64_t row = 0; row < rows; row++) {
            const int64_t seat = row / pass->nodes, first = seat * pass->slots_per_seat * slot + h * dim;
            const uint8_t *shown = pass->visible + seat * pass->batch_stride + row % pass->nodes * pass->node_stride;
            int64_t count = 0;
            for (int64_t s = 0; s < pass->read; s++) {
                visible[count] = (int32_t)s;
                count += shown[s] != 0;
            }
            for (int64_t head = h * groups; head < (h + 1) * groups; head++) {
                softmax(projected + row * joined + head * dim, keys + first, slot, dim, scale, visible, count, weights);
                weigh(weights, values + first, slot, dim, visible, count, attended + (row * heads + head) * dim);
            }
        }
    share_product(&layer->attention_output, rows, attended, x, x, rounded, pass->threads);
#pragma omp for
    for (int64_t row = 0; row < rows; row++)
        normalise_row(x + row * size, size, layer->mlp_norm.weight, layer->mlp_norm.eps, normed + row * size);
    share_product(&layer->gate_up, rows, normed, NULL, gate_up, rounded, pass->threads);
#pragma omp for
    for (int64_t row = 0; row < rows; row++) gate_row(gate_up + row * 2 * gated, gated, gates + row * gated);
    share_product(&layer->down, rows, gates, x, x, rounded, pass->threads);
}

/* Decoder layers one behind the other, each with its keys and its values. */
void run_layers(const Layer *layers, int64_t count, const Pass *pass, float *const *keys, float *const *values,
                const float *embedding, float *x) {
#pragma omp parallel num_threads((int)pass->threads) if (pass->threads > 1)
    for (int64_t i = 0; i < count; i++) run_layer(layers + i, pass, keys[i], values[i], embedding, x);
}

/* An EAGLE network. What its first layer reads is fc [embedding; hidden], if there is an fc, or norm(hidden), or hidden;
   layers with an embedding_norm read the embedding themselves. */
typedef struct {
    const float *embeddings; /* [tokens, D] */
    Product fc;
    Norm hidden_norm;
    const Layer *layers;
    int64_t num_layers;
} Draft;

/* Its outputs x [rows, D], from hidden [rows, D] and the tokens one step ahead. joined [rows, 2 D] is scratch. */
void run_draft(const Draft *draft, const Pass *pass, float *const *keys, float *const *values, const float *hidden,
               const int64_t *tokens, float *joined, float *x) {
    const int64_t rows = pass->batch * pass->nodes, size = draft->layers->attention_output.outputs,
                  width = draft->fc.panels ? 2 * size : size;
#pragma omp parallel num_threads((int)pass->threads) if (pass->threads > 1)
    {
#pragma omp for
        for (int64_t row = 0; row < rows; row++) {
            const float *state = hidden + row * size;
            float *out = draft->fc.panels ? joined + row * width + size : x + row * size;
            memcpy(joined + row * width, draft->embeddings + tokens[row] * size, (size_t)size * sizeof *joined);
            if (draft->hidden_norm.weight)
                normalise_row(state, size, draft->hidden_norm.weight, draft->hidden_norm.eps, out);
            else
                memcpy(out, state, (size_t)size * sizeof *out);
        }
        if (draft->fc.panels) share_product(&draft->fc, rows, joined, NULL, x, pass->scratch, pass->threads);
        for (int64_t i = 0; i < draft->num_layers; i++)
            run_layer(draft->layers + i, pass, keys[i], values[i], joined, x);
    }
}

/* Logits [rows, outputs] of outputs x [rows, D], by a norm, whose result is normed [rows, D]. */
void read_out(const Norm *norm, const Product *head, int64_t rows, const float *x, float *normed, float *logits,
              int threads) {
    float *scratch = new_scratch(head, rows);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for
        for (int64_t row = 0; row < rows; row++)
            normalise_row(x + row * head->inputs, head->inputs, norm->weight, norm->eps, normed + row * head->inputs);
        share_product(head, rows, normed, NULL, logits, scratch, threads);
    }
    free(scratch);
}
