// What the clusters of ssd_fwd take of the heads, on the host: every chunk once, states handed on to whoever goes on with
// that head, and nobody waiting for a cluster of a higher number, which may not have begun.

#include <algorithm>
#include <cstdio>
#include <utility>
#include <vector>

using std::max, std::min;
#define __device__
#define __forceinline__ inline
#include "kernels/ssd_pieces.cuh"

using namespace shedder;

namespace {

// What is wrong with a deal, or null. `places`: of states that clusters leave.
const char *wrong_with(const SsdParams &p, int places) {
    const int chunks = (p.length + kChunk - 1) / kChunk;
    std::vector<int> covered(p.units * chunks), leavers(places, -1), takers(places);
    std::vector<std::pair<int, int>> states(places);         // unit, chunk that comes next
    std::vector<std::vector<SsdPiece>> pieces(p.clusters);
    for (int number = 0; number < p.clusters; ++number) {
        const SsdPlace place = place_of(p, number);
        for (int i = 0; i < pieces_of(p, place); ++i) {
            const SsdPiece piece = piece_of(p, place, i);
            if (piece.unit < 0 || piece.unit >= p.units || piece.first < 0 || piece.first >= piece.last
                || piece.last > chunks)
                return "a piece lies outside of the units, or is empty";
            for (int chunk = piece.first; chunk < piece.last; ++chunk) ++covered[piece.unit * chunks + chunk];
            if ((piece.first > 0) != (piece.takes >= 0)) return "a piece does not take the state before it";
            if ((piece.last < chunks) != (piece.leaves >= 0)) return "a piece does not leave the state behind it";
            if (piece.leaves >= 0) {
                if (piece.leaves >= places || leavers[piece.leaves] >= 0) return "a place has two states, or is not there";
                leavers[piece.leaves] = number;
                states[piece.leaves] = {piece.unit, piece.last};
            }
            pieces[number].push_back(piece);
        }
    }
    for (int count : covered)
        if (count != 1) return "a chunk is not taken once";
    for (int number = 0; number < p.clusters; ++number)
        for (const SsdPiece &piece : pieces[number])
            for (int i = 0; piece.takes >= 0 && i < piece.taken; ++i) {      // of segments, all before it
                const int from = piece.takes - i * piece.apart;
                if (from < 0 || from >= places || states[from].first != piece.unit) return "a state of another unit is taken";
                if (i == 0 && states[from].second != piece.first) return "a state of another chunk is taken";
                if (leavers[from] > number) return "a cluster waits for one of a higher number";
                ++takers[from];
            }
    if (p.segment_chunks == 0)
        for (int count : takers)
            if (count != 1) return "a state is not taken once";

    // In time: a cluster stops at a state that nobody has left yet, and goes on later. Of segments states are left
    // before any is waited for.
    std::vector<bool> is_left(places, p.segment_chunks > 0);
    std::vector<size_t> done(p.clusters);
    for (bool moved = true; moved;) {
        moved = false;
        for (int number = 0; number < p.clusters; ++number)
            while (done[number] < pieces[number].size()) {
                const SsdPiece &piece = pieces[number][done[number]];
                if (piece.takes >= 0 && !is_left[piece.takes]) break;
                if (piece.leaves >= 0) is_left[piece.leaves] = true;
                ++done[number];
                moved = true;
            }
    }
    for (int number = 0; number < p.clusters; ++number)
        if (done[number] < pieces[number].size()) return "a cluster waits for ever";
    return nullptr;
}

SsdParams of_units(int units, int chunks) {
    SsdParams p{};
    p.length = chunks * kChunk - 5;
    p.heads = p.cluster = p.rounds = p.tiles = 1;
    p.units = p.states = p.clusters = units;
    return p;
}

// Two million chunks, more than memory holds of so many units: the end of a unit begins where its start ends.
bool long_chains_meet() {
    SsdParams p = of_units(263, 2'000'000);
    p.clusters = 132;
    p.left = p.chain = 131;
    p.apart = 1;
    bool meet = true;
    for (int number = 0; number < p.left; ++number) {
        const int start = place_of(p, number).start;
        meet &= 0 < start && start < 2'000'000 && place_of(p, number + p.apart).end == start;
    }
    if (!meet) std::printf("long chains do not meet\n");
    return meet;
}

int checked = 0;

bool is_right(const SsdParams &p, int places, const char *kind) {
    ++checked;
    const char *const wrong = wrong_with(p, places);
    if (wrong != nullptr)
        std::printf("%s: %d units, %d clusters, %d left, parts %d, chains of %d, segments of %d behind %d whole, "
                    "%d chunks: %s\n",
                    kind, p.units, p.clusters, p.left, p.parts, p.chain, p.segment_chunks, p.whole,
                    (p.length + kChunk - 1) / kChunk, wrong);
    return wrong == nullptr;
}

}  // namespace

int main() {
    bool right = long_chains_meet();
    for (int chunks : {1, 2, 3, 5, 8, 16, 31, 32, 33, 100}) {
        for (int units : {1, 5, 66, 264}) right &= is_right(of_units(units, chunks), 0, "whole units");
        for (int slots : {7, 12, 132})
            for (int units = slots + 1; units < 3 * slots; ++units) {
                SsdParams p = of_units(units, chunks);
                p.clusters = slots;
                p.rounds = units / slots;
                p.left = units % slots;
                if (p.left == 0) continue;
                for (p.parts = 2; p.parts <= 4; ++p.parts) {
                    p.apart = p.left;
                    if (p.left * p.parts <= slots && chunks >= 2 * p.parts)
                        right &= is_right(p, (2 * p.parts - 3) * p.left, "parts");
                }
                p.parts = 0;
                for (p.chain = 2; p.chain <= 8; ++p.chain) {
                    p.apart = (p.left + p.chain - 1) / p.chain;
                    if (p.left + p.apart <= slots && chunks > p.chain) right &= is_right(p, p.left, "chains");
                }
            }
        for (int units : {1, 5, 40})
            for (int whole : {0, 1, 4, 30})
                for (int segments = 2; whole < units && segments <= chunks; ++segments) {
                    SsdParams p = of_units(units, chunks);
                    p.whole = whole;
                    p.segment_chunks = (chunks + segments - 1) / segments;
                    const int count = (chunks + p.segment_chunks - 1) / p.segment_chunks;
                    p.clusters = whole + (units - whole) * count;
                    right &= is_right(p, (units - whole) * (count - 1), "segments");
                }
    }
    std::printf("%d deals\n", checked);
    return right ? 0 : 1;
}
