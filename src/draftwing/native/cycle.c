/* What a cycle does beside its networks: noise, the best tokens, a tree's levels and nodes, the walk that accepts.

   engine/native_cycle.py calls this. A row's results depend on that row alone. Sizes and strides are in numbers; the last
   dimension has no gaps. */

#include <stdlib.h>

#include "lanes.h"

INLINE uint32_t hash(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x ^ (x >> 16);
}

/* Uniform numbers of `count` tokens for each row with two keys, as noise.py has them. */
void draw(const int64_t *first, const int64_t *second, int64_t rows, int64_t count, float *out, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        const uint32_t one = (uint32_t)first[row], two = (uint32_t)second[row];
        for (int64_t token = 0; token < count; token++)
            out[row * count + token] = ((float)hash(hash((uint32_t)token ^ one) + two) + 0.5f) * 0x1p-32f;
    }
}


/* Noise where it lies: that of position p of batch row b in row p % num_kept of kept [batch, num_kept, tokens]. */
typedef struct {
    const float *kept; /* NULL: there is none */
    const int64_t *positions;
    const float *temperature; /* [batch]; rows of 0 have no noise */
    int64_t num_kept, tokens;
} Noise;

INLINE const float *noise_of(const Noise *noise, int64_t batch, int64_t position) {
    return noise->kept + (batch * noise->num_kept + position % noise->num_kept) * noise->tokens;
}

/* The best of what was entered, the best first; of equal ones the one that was entered first. */
typedef struct {
    float *values;
    int64_t *numbers;
    int64_t count, most;
} Best;

INLINE void enter(Best *best, float value, int64_t number) {
    int64_t place = best->count;
    if (place == best->most) {
        if (place == 0 || !(value > best->values[place - 1])) return;
        place--;
    } else {
        best->count++;
    }
    for (; place > 0 && value > best->values[place - 1]; place--) {
        best->values[place] = best->values[place - 1];
        best->numbers[place] = best->numbers[place - 1];
    }
    best->values[place] = value;
    best->numbers[place] = number;
}

INLINE int any(Numbers which) {
    int32_t parts[LANES], found = 0;
    memcpy(parts, &which, sizeof parts);
    for (int i = 0; i < LANES; i++) found |= parts[i];
    return found;
}

enum { AT_ONCE = 4 * LANES };

INLINE int64_t enter_until(Best *best, const float *value, int64_t i, int64_t stop, float lowest) {
    for (; i < stop; i++) enter(best, value[i] > lowest ? value[i] : lowest, i);
    return i;
}

/* The best of some numbers, of which none counts as less than the lowest. */
INLINE void enter_all(Best *best, const float *value, int64_t count, float lowest) {
    int64_t i = enter_until(best, value, 0, best->most < count ? best->most : count, lowest);
    while (i + AT_ONCE <= count) {
        Lanes least = all(best->values[best->most - 1]);
        Numbers are_better = {};
        for (int part = 0; part < AT_ONCE; part += LANES) are_better |= AT(value + i + part) > least;
        i = any(are_better) ? enter_until(best, value, i, i + AT_ONCE, lowest) : i + AT_ONCE;
    }
    enter_until(best, value, i, count, lowest);
}

/* log(sum(e^x)) of some numbers of which none is above `highest`. */
INLINE float log_sum(const float *x, int64_t count, float highest) {
    Lanes sums = all(0);
    int64_t i = 0;
#define EXPONENTIAL(distance) choose((distance) < -87.0f, all(0), exponential(distance))
    for (; i + LANES <= count; i += LANES) sums += EXPONENTIAL(AT(x + i) - highest);
    float sum = total(sums);
    for (; i < count; i++) sum += EXPONENTIAL(all(x[i] - highest))[0];
#undef EXPONENTIAL
    return highest + logf(sum);
}

/* The `width` highest log-probabilities `best`, and their ids, of each row of logits [batch, nodes, count]; in rows with
   noise those of (logits + T noise) * scale. Token i has the noise of target_ids[i], or its own. */
void top_tokens(const float *logits, int64_t batch, int64_t nodes, int64_t count, const Noise *noise,
                const int64_t *target_ids, float scale, int64_t width, float *best, int64_t *ids, int threads) {
    const float lowest = -0x1.fffffep127f;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < batch * nodes; row++) {
        const float *value = logits + row * count, temperature = noise->kept ? noise->temperature[row / nodes] : 0;
        float *changed = NULL;
        if (temperature > 0) {
            const float *added = noise_of(noise, row / nodes, noise->positions[row / nodes]), share = temperature * scale;
            changed = malloc((size_t)count * sizeof *changed);
            if (target_ids)
                for (int64_t i = 0; i < count; i++) changed[i] = value[i] * scale + added[target_ids[i]] * share;
            else
                for (int64_t i = 0; i < count; i++) changed[i] = value[i] * scale + added[i] * share;
            value = changed;
        }
        Best found = {best + row * width, ids + row * width, 0, width};
        enter_all(&found, value, count, lowest);
        const float sum = log_sum(value, count, found.values[0]);
        for (int64_t i = 0; i < width; i++)
            found.values[i] = (found.values[i] > lowest ? found.values[i] : -INFINITY) - sum;
        free(changed);
    }
}

INLINE Lanes score_of(Lanes logits, const float *added, float temperature) {
    if (!added) return logits;
    return logits / temperature + AT(added);
}

/* The token of each row of logits [batch, nodes, count] that has the highest of logits / T + noise, or of logits; the
   first of equal ones. What is no number is above all. */
void choose_tokens(const float *logits, int64_t batch, int64_t nodes, int64_t count, const Noise *noise,
                   int64_t *chosen, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < batch * nodes; row++) {
        const float *value = logits + row * count, temperature = noise->kept ? noise->temperature[row / nodes] : 0;
        const float *added = temperature > 0 ? noise_of(noise, row / nodes, noise->positions[row]) : NULL;
        float highest = -INFINITY, scores[LANES];
        int64_t best = 0;
        for (int64_t i = 0; i < count; i += LANES) {
            float rest[2][LANES] = {};
            const float *x = value + i, *noise_here = added ? added + i : NULL;
            const int64_t width = count - i < LANES ? count - i : LANES;
            if (width < LANES) {
                memcpy(rest[0], x, (size_t)width * sizeof *x);
                if (added) memcpy(rest[1], noise_here, (size_t)width * sizeof *x);
                x = rest[0], noise_here = added ? rest[1] : NULL;
            }
            Lanes score = score_of(AT(x), noise_here, temperature);
            if (!any(~(score <= highest))) continue;
            memcpy(scores, &score, sizeof scores);
            for (int64_t lane = 0; lane < width && highest == highest; lane++)
                if (!(scores[lane] <= highest)) highest = scores[lane], best = i + lane;
            if (highest != highest) break;
        }
        chosen[row] = best;
    }
}

/* Candidates by row, `count` a row: see engine/tree.py. */
typedef struct {
    int64_t *tokens;
    float *scores, *log_probs;
    int64_t *parents, *depths;
    int64_t count;
} Candidates;

typedef struct {
    int64_t *tokens;
    float *scores;
    int64_t *numbers, *parents;
} Frontier;

/* The children log_probs [rows, parents, width] of a frontier become the candidates from `first` on. Their score is the
   parent's and what they are worth: the log-probability, plus what is added in its bin, at most `most`. The best `width`
   children of a row are its next frontier, unless that has no room. What is no number counts as the highest. */
void grow_level(const float *log_probs, const int64_t *draft_ids, int64_t rows, int64_t parents, int64_t width,
                const int64_t *target_ids, const Frontier *before, const float *edges, int64_t num_edges,
                const float *added, float most, int64_t first, int64_t depth, const Candidates *into,
                const Frontier *next) {
    const int64_t children = parents * width;
    for (int64_t row = 0; row < rows; row++) {
        const int64_t start = row * into->count + first;
        float *scores = into->scores + start;
        Best best = {next->scores + row * width, next->numbers + row * width, 0, width};
        for (int64_t i = 0; i < children; i++) {
            const int64_t child = row * children + i, parent = row * parents + i / width;
            const float log_prob = log_probs[child];
            float worth = log_prob;
            if (added) {
                int64_t bin = 0;
                for (int64_t edge = 0; edge < num_edges; edge++) bin += log_prob > edges[edge];
                worth = log_prob + added[bin];
                worth = worth > most ? most : worth;
            }
            scores[i] = before->scores ? worth + before->scores[parent] : worth;
            into->tokens[start + i] = target_ids ? target_ids[draft_ids[child]] : draft_ids[child];
            into->log_probs[start + i] = log_prob;
            into->parents[start + i] = before->numbers ? before->numbers[parent] : -1;
            into->depths[start + i] = depth;
            if (next->tokens) enter(&best, scores[i] == scores[i] ? scores[i] : INFINITY, i);
        }
        for (int64_t rank = 0; rank < best.count; rank++) {
            const int64_t i = best.numbers[rank], goal = row * width + rank;
            next->tokens[goal] = into->tokens[start + i];
            next->scores[goal] = scores[i];
            next->numbers[goal] = first + i;
            next->parents[goal] = i / width;
        }
    }
}

/* What the nodes [batch, nodes] see of the slots: what their parents do, of `visible` by strides, and their own slot,
   lengths[b] + first + node, or the last. */
void inherit_slots(const uint8_t *visible, int64_t batch_stride, int64_t parent_stride, int64_t slots,
                   const int64_t *parent, const int64_t *lengths, int64_t batch, int64_t nodes, int64_t first,
                   uint8_t *seen) {
    for (int64_t b = 0; b < batch; b++)
        for (int64_t node = 0; node < nodes; node++, seen += slots) {
            const int64_t own = lengths[b] + first + node;
            memcpy(seen, visible + b * batch_stride + parent[b * nodes + node] * parent_stride, (size_t)slots);
            seen[own < slots ? own : slots - 1] = 1;
        }
}

/* Nodes by row: see engine/tree.py. */
typedef struct {
    int64_t *tokens, *parents, *depths;
    uint8_t *valid;
    float *scores, *log_probs;
} Nodes;

/* The root, then the best of the candidates in their order, numbered anew. What is no number counts as the lowest. */
void best_nodes(const int64_t *root, const Candidates *from, int64_t rows, int64_t nodes, const Nodes *into) {
    const int64_t candidates = from->count;
    int64_t *numbers = malloc(((size_t)nodes + (size_t)candidates) * sizeof *numbers), *node_of = numbers + nodes;
    float *scores = malloc((size_t)nodes * sizeof *scores);
    for (int64_t row = 0; row < rows; row++) {
        const int64_t start = row * candidates, goal = row * nodes;
        Best best = {scores, numbers, 0, nodes - 1};
        for (int64_t i = 0; i < candidates; i++) {
            const float score = from->scores[start + i];
            enter(&best, score == score ? score : -INFINITY, i);
            node_of[i] = 0;
        }
        for (int64_t i = 0; i < best.count; i++) node_of[numbers[i]] = 1;
        into->tokens[goal] = root[row];
        into->parents[goal] = into->depths[goal] = 0;
        into->scores[goal] = into->log_probs[goal] = 0;
        into->valid[goal] = 1;
        for (int64_t i = 0, node = 0; i < candidates; i++) {
            if (!node_of[i]) continue;
            const int64_t parent = from->parents[start + i], place = goal + (node_of[i] = ++node);
            const float score = from->scores[start + i];
            into->tokens[place] = from->tokens[start + i];
            into->parents[place] = parent < 0 ? 0 : node_of[parent];
            into->depths[place] = from->depths[start + i];
            into->scores[place] = score == score ? score : -INFINITY;
            into->log_probs[place] = from->log_probs[start + i];
            /* Where rounding has put a node above its parent and the parent fell out, it must not hang on the root. */
            into->valid[place] = score - score == 0 && (parent < 0 || node_of[parent] > 0);
        }
    }
    free(numbers);
    free(scores);
}

/* Whether the column's node is the row's node or an ancestor of it: reach [rows, nodes, nodes]. */
void ancestors(const int64_t *parents, int64_t rows, int64_t nodes, uint8_t *reach) {
    for (int64_t row = 0; row < rows; row++, parents += nodes, reach += nodes * nodes)
        for (int64_t node = 0; node < nodes; node++) {
            uint8_t *own = reach + node * nodes;
            if (parents[node] < node)
                memcpy(own, reach + parents[node] * nodes, (size_t)nodes);
            else
                memset(own, 0, (size_t)nodes);
            own[node] = 1;
        }
}

/* Which of the first `read` slots each new node reads: those before lengths[b], and its ancestors' behind. */
void visible_slots(const int64_t *lengths, const uint8_t *ancestors, int64_t batch, int64_t nodes, int64_t behind,
                   int64_t read, uint8_t *visible) {
    for (int64_t b = 0; b < batch; b++)
        for (int64_t node = 0; node < nodes; node++, visible += read, ancestors += behind) {
            const int64_t length = lengths[b] < read ? lengths[b] : read,
                          own = read - length < behind ? read - length : behind;
            memset(visible, 1, (size_t)length);
            memcpy(visible + length, ancestors, (size_t)own);
            memset(visible + length + own, 0, (size_t)(read - length - own));
        }
}

/* Accept the longest branch whose tokens are chosen [rows, nodes] at their parents. A node without a choice, below 0, is
   not accepted. */
void walk(const int64_t *tokens, const int64_t *parents, const int64_t *depths, const uint8_t *valid,
          const int64_t *chosen, int64_t rows, int64_t nodes, int64_t length, uint8_t *accepted, int64_t *path,
          int64_t *num_accepted, int64_t *emitted) {
    for (int64_t row = 0; row < rows; row++) {
        const int64_t start = row * nodes;
        memset(path + row * length, 0, (size_t)length * sizeof *path);
        accepted[start] = 1;
        num_accepted[row] = 0;
        for (int64_t node = 1; node < nodes; node++) {
            const int64_t parent = start + parents[start + node];
            accepted[start + node] = valid[start + node] && accepted[parent] && chosen[start + node] >= 0 &&
                                     chosen[parent] == tokens[start + node];
            if (!accepted[start + node]) continue;
            num_accepted[row]++;
            path[row * length + depths[start + node]] = node;
        }
        for (int64_t i = 0; i < length; i++) emitted[row * length + i] = chosen[start + path[row * length + i]];
    }
}
