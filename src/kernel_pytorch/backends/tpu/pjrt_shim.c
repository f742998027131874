/* A PJRT plugin that stands between torch_tpu 0.2.0 and a PJRT CPU plugin, so that TPU code runs without a chip.
 *
 * It hands on every entry of the CPU plugin's function table but three:
 *   Client_Create                  drops the client's options: CPU plugins refuse `premapped_buffer_size`, a TPU's.
 *   Client_Compile                 first writes the program to $KPT_PJRT_DUMP/NNNN.FORMAT, if that is set.
 *   Executable_OutputMemoryKinds   says "device" for each output; CPU plugins leave it unimplemented, and torch_tpu
 *                                  calls it for every compiled graph.
 *
 * The PJRT C API (openxla/xla, xla/pjrt/c/pjrt_c_api.h) is append-only: fields and functions keep their places, so the
 * few that are used here are declared below rather than taken from a header that no package brings. Run with API 0.81,
 * 0.106 and 0.115.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct Error Error;
typedef Error *(*Function)(void *arguments);

/* PJRT_Api: a header of five words (size, extension, then PJRT_Api_Version: size, extension, major and minor). */
enum { HEADER_WORDS = 5, CLIENT_CREATE = 10, CLIENT_COMPILE = 20, NUM_OUTPUTS = 44, OUTPUT_MEMORY_KINDS = 47 };

typedef struct {
  size_t struct_size;
  void *extension;
  struct {
    size_t struct_size;
    void *extension;
    int major, minor;
  } version;
  Function functions[];
} Api;

_Static_assert(offsetof(Api, functions) == HEADER_WORDS * sizeof(void *), "the table begins after five words");

typedef struct {
  size_t struct_size;
  void *extension;
  const void *options;
  size_t num_options;
} ClientCreate;

typedef struct {
  size_t struct_size;
  void *extension;
  const char *code;
  size_t code_size;
  const char *format; /* "mlir" */
  size_t format_size;
} Program;

typedef struct {
  size_t struct_size;
  void *extension;
  void *client;
  const Program *program;
} ClientCompile;

typedef struct {
  size_t struct_size;
  void *extension;
  void *executable;
  size_t num_outputs;
} NumOutputs;

typedef struct {
  size_t struct_size;
  void *extension;
  void *executable;
  size_t num_outputs;
  const char *const *memory_kinds;
  const size_t *memory_kind_sizes;
} OutputMemoryKinds;

static const Api *real;
static Api *shim;
static atomic_int programs;

static Error *client_create(void *arguments) {
  ClientCreate *create = arguments;
  create->num_options = 0;
  return real->functions[CLIENT_CREATE](arguments);
}

static void dump(const char *directory, const Program *program) {
  char path[4096];
  int number = atomic_fetch_add(&programs, 1);
  int length = snprintf(path, sizeof path, "%s/%04d.%.*s", directory, number, (int)program->format_size, program->format);
  if (length < 0 || (size_t)length >= sizeof path) return;
  FILE *file = fopen(path, "wb");
  if (!file) return;
  fwrite(program->code, 1, program->code_size, file);
  fclose(file);
}

static Error *client_compile(void *arguments) {
  const ClientCompile *compile = arguments;
  const char *directory = getenv("KPT_PJRT_DUMP");
  if (directory && *directory) dump(directory, compile->program);
  return real->functions[CLIENT_COMPILE](arguments);
}

/* The caller never frees what it gets (the API has the executable own it), and each executable is asked once: the two
 * arrays live as long as the process, as compiled programs do. */
static Error *output_memory_kinds(void *arguments) {
  static const char device[] = "device";
  OutputMemoryKinds *kinds = arguments;
  NumOutputs count = {sizeof count, NULL, kinds->executable, 0};
  Error *error = real->functions[NUM_OUTPUTS](&count);
  if (error) return error;
  const char **names = malloc((count.num_outputs + 1) * sizeof *names);
  size_t *sizes = malloc((count.num_outputs + 1) * sizeof *sizes);
  if (!names || !sizes) abort();
  for (size_t i = 0; i < count.num_outputs; i++) {
    names[i] = device;
    sizes[i] = sizeof device - 1;
  }
  kinds->num_outputs = count.num_outputs;
  kinds->memory_kinds = names;
  kinds->memory_kind_sizes = sizes;
  return NULL;
}

static void fail(const char *what, const char *detail) {
  fprintf(stderr, "kernel_pytorch PJRT shim: %s: %s\n", what, detail ? detail : "");
  abort();
}

__attribute__((visibility("default"))) const void *GetPjrtApi(void) {
  if (shim) return shim;
  const char *path = getenv("KPT_PJRT_REAL");
  if (!path) fail("KPT_PJRT_REAL", "is not set; it names the plugin behind this one");
  void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) fail("cannot load the plugin", dlerror());
  const Api *(*get)(void) = (const Api *(*)(void))dlsym(library, "GetPjrtApi");
  if (!get) fail("no GetPjrtApi in", path);
  real = get();
  if (real->struct_size < offsetof(Api, functions) + (OUTPUT_MEMORY_KINDS + 1) * sizeof(Function))
    fail("the plugin's API is too old", path);
  Api *copy = malloc(real->struct_size);
  if (!copy) abort();
  memcpy(copy, real, real->struct_size);
  copy->functions[CLIENT_CREATE] = client_create;
  copy->functions[CLIENT_COMPILE] = client_compile;
  copy->functions[OUTPUT_MEMORY_KINDS] = output_memory_kinds;
  shim = copy;
  return shim;
}
