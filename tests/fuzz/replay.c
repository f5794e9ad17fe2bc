/*
 * replay.c - a fuzz target without a fuzzer: runs it on the files named, and on
 * all files in the directories named.  Any cc will do.
 *
 *     cc -o replay-answer replay.c answer.c && ./replay-answer corpus/answer
 */
#include "fuzz.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>

static unsigned long count;

static void run_file(const char *path)
{
    FILE *file = fopen(path, "rb");
    unsigned char *bytes = NULL;
    size_t size = 0, room = 0, n;

    if (file == NULL) {
        perror(path);
        exit(2);
    }
    do {
        room += 65536;
        bytes = realloc(bytes, room);
        assert(bytes != NULL);
        n = fread(bytes + size, 1, room - size, file);
        size += n;
    } while (n > 0);
    fclose(file);
    bytes = realloc(bytes, size + (size == 0));     /* no larger, so that a sanitizer sees what reads on */
    assert(bytes != NULL);
    printf("%s\n", path);
    fflush(stdout);                                 /* the last one named is the one that failed */
    LLVMFuzzerTestOneInput(bytes, size);
    free(bytes);
    count++;
}

static void run_directory(const char *path, DIR *directory)
{
    struct dirent *entry;

    while ((entry = readdir(directory)) != NULL) {
        char file[4096];

        if (entry->d_name[0] != '.' && (size_t)snprintf(file, sizeof file, "%s/%s", path, entry->d_name) < sizeof file)
            run_file(file);
    }
    closedir(directory);
}

int main(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        DIR *directory = opendir(argv[i]);

        if (directory != NULL)
            run_directory(argv[i], directory);
        else
            run_file(argv[i]);
    }
    printf("%lu inputs, no finding\n", count);
    return count > 0 ? 0 : 2;       /* nothing run is nothing shown */
}
