#pragma once

#include "arg.h"

#include <string>
#include <vector>

// The command line of the compressed KV cache (llama_context_params.kv_spectral).

// --kv-spectral, --kv-spectral-window, --kv-spectral-bits, --kv-spectral-fine, --kv-spectral-basis
std::vector<common_arg> common_kv_spectral_args();

// Is the value of an option with an optional value left out, because another option or the end follows argv[i]?
template <typename T>
bool common_arg_value_is_implicit(const common_arg & opt, const T & arg_to_options, int argc, char ** argv, int i) {
    if (!opt.value_implicit || i + 1 >= argc) {
        return opt.value_implicit != nullptr;
    }
    std::string next = argv[i + 1];
    if (next.compare(0, 2, "--") == 0) {
        for (auto & c : next) {
            c = c == '_' ? '-' : c;
        }
    }
    return arg_to_options.find(next) != arg_to_options.end();
}

// The same options for llama-bench, where --kv-spectral takes a list.
struct common_kv_spectral_bench {
    // one run of the benchmark
    struct setting {
        float   ratio;
        int32_t window;
        float   bits;
        int32_t fine;

        std::string basis;

        uint16_t    config() const;
        std::string str()    const; // "0" when off
    };

    // false when arg is none of the options
    bool parse(const std::string & arg, int argc, char ** argv, int & i);

    // never empty; what was not given comes from the environment, as for the other tools; exits when a value is not valid
    std::vector<setting> settings() const;

    // nothing was asked for, so there is nothing to show
    bool is_default() const;

private:
    std::string ratios;
    std::string window;
    std::string bits;
    std::string fine;
    std::string basis;
};
