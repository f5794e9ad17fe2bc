/* readback.h - see readback.c */
#ifndef READBACK_H
#define READBACK_H

#include <stddef.h>

/* A message as it was handed over reads back as what it says, or this aborts. */
void read_back(const char *bytes, size_t size);

#endif
