// Matrix products in tiles through a stand-in of AMX in ordinary loops, to test them on any machine.
#define FALCON_ISA plain_tiles
#define FALCON_VECTOR_BYTES 16
#include "isa.h"
#include "panels.h"
#include "products.h"
#include "tiles.h"
