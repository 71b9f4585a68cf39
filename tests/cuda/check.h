// What programs under tests/cuda fail with, and how they watch a child fail. Knows nothing of the shim.
#pragma once

#include <stdio.h>
#include <stdlib.h>
#include <string>
#include <sys/wait.h>
#include <unistd.h>

// Not assert(): it must count in every build.
#define CHECK(condition)                                                                                                               \
    do {                                                                                                                               \
        if (!(condition)) {                                                                                                            \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                                                            \
            exit(1);                                                                                                                   \
        }                                                                                                                              \
    } while (0)

#define EQUAL(a, b)                                                                                                                    \
    do {                                                                                                                               \
        const double a_ = static_cast<double>(a), b_ = static_cast<double>(b);                                                         \
        if (!(a_ == b_)) {                                                                                                             \
            fprintf(stderr, "%s:%d: %s is %.9g, %s is %.9g\n", __FILE__, __LINE__, #a, a_, #b, b_);                                    \
            exit(1);                                                                                                                   \
        }                                                                                                                              \
    } while (0)

// What a child prints that runs `what`, which must end it otherwise than well.
template <class What>
std::string last_words(What what) {
    int ends[2];
    CHECK(pipe(ends) == 0);
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        dup2(ends[1], 2);
        what();
        _exit(0);
    }
    close(ends[1]);
    std::string words;
    char buffer[4096];
    for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) > 0;)
        words.append(buffer, static_cast<size_t>(n));
    close(ends[0]);
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0) {
        fprintf(stderr, "a child ends well that should not:\n%s\n", words.c_str());
        exit(1);
    }
    return words;
}

// What a child printed has all these parts.
template <class... Parts>
void says(const std::string &words, Parts... parts) {
    for (const char *part : {parts...})
        if (words.find(part) == std::string::npos) {
            fprintf(stderr, "\"%s\" is not in:\n%s\n", part, words.c_str());
            exit(1);
        }
}
