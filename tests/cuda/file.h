// Files of numbers and buffers that the Rust tests write for programs in tests/cuda. Knows nothing of what they mean.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <string>
#include <vector>

[[noreturn]] inline void fail(const std::string &what) {
    fprintf(stderr, "%s\n", what.c_str());
    exit(1);
}

/// Numbers and buffers, each of these with its bytes in front.
class File {
  public:
    explicit File(const char *path) {
        FILE *f = fopen(path, "rb");
        if (f == nullptr)
            fail(std::string("cannot open ") + path);
        fseek(f, 0, SEEK_END);
        bytes.resize(size_t(ftell(f)));
        rewind(f);
        if (fread(bytes.data(), 1, bytes.size(), f) != bytes.size())
            fail(std::string("cannot read ") + path);
        fclose(f);
    }
    int64_t number() {
        int64_t x;
        take(&x, sizeof x);
        return x;
    }
    /// A buffer of its own, so that what lies outside of it is seen to be read.
    template <class T> std::vector<T> buffer() {
        const size_t n = size_t(number());
        if (n % sizeof(T) != 0 || n > bytes.size() - at)
            fail("the file ends early");
        std::vector<T> out(n / sizeof(T));
        take(out.data(), n);
        return out;
    }

  private:
    std::vector<uint8_t> bytes;
    size_t at = 0;

    void take(void *to, size_t n) {
        if (n > bytes.size() - at)
            fail("the file ends early");
        if (n != 0)
            memcpy(to, &bytes[at], n);
        at += n;
    }
};
