// What shuffles and votes do when the lanes of a warp have met. Knows nothing of how they meet.
#include "block.h"

namespace shim {

namespace {

const char *name(Shuffle kind) {
    switch (kind) {
    case Shuffle::From: return "__shfl_sync";
    case Shuffle::Xor: return "__shfl_xor_sync";
    default: return "__shfl_down_sync";
    }
}

const char *name(Vote kind) {
    switch (kind) {
    case Vote::Ballot: return "__ballot_sync";
    case Vote::Any: return "__any_sync";
    default: return "__all_sync";
    }
}

struct Shuffled {
    Shuffle kind;
    unsigned operand;
    unsigned width;
    uint64_t value;
    uint64_t result;

    // The lane whose value this lane gets: its own where that is beyond the lanes of its segment.
    unsigned source(unsigned lane) const {
        const unsigned last = lane | (width - 1);
        if (kind == Shuffle::From)
            return (lane & ~(width - 1)) | (operand & (width - 1));
        const uint64_t wanted = kind == Shuffle::Xor ? lane ^ operand : uint64_t{lane} + operand;
        return wanted > last ? lane : static_cast<unsigned>(wanted);
    }
};

void settle_shuffle(unsigned mask, void *const *brought) {
    const auto of = [&](unsigned lane) -> Shuffled & { return *static_cast<Shuffled *>(brought[lane]); };
    for (unsigned lane = 0; lane < 32; lane++) {
        if ((mask >> lane & 1) == 0)
            continue;
        const unsigned source = of(lane).source(lane);
        of(lane).result = (mask >> source & 1) != 0 ? of(source).value : ~uint64_t{0};
    }
}

struct Voted {
    bool predicate;
    unsigned ballot;
};

void settle_vote(unsigned mask, void *const *brought) {
    const auto of = [&](unsigned lane) -> Voted & { return *static_cast<Voted *>(brought[lane]); };
    unsigned ballot = 0;
    for (unsigned lane = 0; lane < 32; lane++)
        if ((mask >> lane & 1) != 0 && of(lane).predicate)
            ballot |= 1u << lane;
    for (unsigned lane = 0; lane < 32; lane++)
        if ((mask >> lane & 1) != 0)
            of(lane).ballot = ballot;
}

} // namespace

uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, int operand, int width, Site site) {
    if (width < 1 || width > 32 || (width & (width - 1)) != 0)
        fail("%s of width %d, %s:%d", name(kind), width, site.file, site.line);
    Shuffled own{kind, static_cast<unsigned>(operand), static_cast<unsigned>(width), value, 0};
    meet({name(kind), mask, site}, &own, settle_shuffle);
    return own.result;
}

unsigned vote(Vote kind, unsigned mask, bool predicate, Site site) {
    Voted own{predicate, 0};
    meet({name(kind), mask, site}, &own, settle_vote);
    switch (kind) {
    case Vote::Ballot: return own.ballot;
    case Vote::Any: return own.ballot != 0;
    default: return own.ballot == mask;
    }
}

} // namespace shim
