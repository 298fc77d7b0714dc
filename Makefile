# Winnow: build, test, demo. `make help` lists the targets.
# One file, no recursion. Modules are static libraries that link in one direction (docs/guide.md).

BUILD ?= build
ifeq ($(origin CC),default)
CC = gcc
endif
MPICC ?= mpicc
PKGS = yaml-0.1 jansson libpcre2-8
CFLAGS ?= -O3 -march=native -g
WARN = -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wvla -Werror
CPPFLAGS += -D_GNU_SOURCE -I. -Isrc $(shell pkg-config --cflags $(PKGS) 2>/dev/null)
# no -ffast-math: NaN, infinities and the order of sums mean what they say; FMA contraction is fine and fixed by the binary
ALL_CFLAGS = -std=c11 -fopenmp -fno-math-errno -fno-trapping-math -ffp-contract=fast $(WARN) $(CFLAGS) -MMD -MP
LDLIBS += $(shell pkg-config --libs $(PKGS) 2>/dev/null) -lopenblas -lxxhash -lm -lpthread
TEST_LDLIBS = -lcmocka

# the CUDA half, where nvcc is (NVCC= leaves it out): Hopper's machine code, for wgmma and the bulk copies
NVCC ?= $(shell command -v nvcc 2>/dev/null || ls /usr/local/cuda/bin/nvcc 2>/dev/null)
CUDA_HOME = $(patsubst %/bin/nvcc,%,$(realpath $(NVCC)))
CUDA_ARCH ?= -gencode=arch=compute_90a,code=sm_90a
NVCC_FLAGS = -std=c++20 -O3 --compress-mode=size $(CUDA_ARCH) -Werror all-warnings -Xcompiler=-Wall,-Wextra,-Wshadow,-Werror,-Wno-deprecated-enum-enum-conversion -ccbin g++ $(NVCCFLAGS)
ifneq ($(NVCC),)
NCCL ?= $(firstword $(wildcard $(CUDA_HOME)/include/nccl.h /usr/include/nccl.h))
NVTX ?= $(wildcard $(CUDA_HOME)/include/nvtx3/nvToolsExt.h)
CPPFLAGS += -isystem $(CUDA_HOME)/include
# calls that a dry device does not make (kernels/cuda/dry.cu)
DRY_CALLS = __cudaLaunchKernel cudaLaunchKernelExC cudaMemcpyAsync cudaMemcpy2DAsync cudaMemsetAsync cudaMemset2DAsync cudaEventRecord \
  cudaFuncSetAttribute cudaGetLastError
LDLIBS += $(DRY_CALLS:%=-Wl,--wrap=%) -L$(CUDA_HOME)/lib64 -Wl,-rpath,$(CUDA_HOME)/lib64 -lcudart_static -ldl -lrt -lstdc++ $(if $(NCCL),-lnccl)
endif

# in link order: a module may use those to its right
MODULES = cli stages train convert model dist data config io kernels base
SRC_cli = $(filter-out src/cli/main.c,$(wildcard src/cli/*.c))
SRC_stages = $(wildcard stages/*.c)
SRC_train = $(wildcard src/train/*.c)
SRC_convert = $(wildcard src/convert/*.c)
SRC_model = $(wildcard src/model/*.c)
SRC_dist = $(filter-out src/dist/nccl%.c,$(wildcard src/dist/*.c)) src/dist/$(if $(NCCL),nccl,nccl_absent).c
SRC_data = $(wildcard data/*.c)
SRC_config = $(wildcard src/config/*.c)
SRC_io = $(wildcard src/io/*.c)
SRC_kernels = $(wildcard kernels/cpu/*.c)
SRC_cuda = $(if $(NVCC),$(wildcard kernels/cuda/*.cu) kernels/cuda/cublas.c,kernels/cuda/absent.c)
SRC_base = $(filter-out src/base/range%.c,$(wildcard src/base/*.c)) src/base/range_$(if $(NVTX),nvtx,absent).c

libs_from = $(foreach m,$(1),$(BUILD)/lib$(m).a)
# V=1 shows whole commands
Q = $(if $(V),,@)
say = @$(if $(V),true,printf "%-5s %s\n" $(1) $(2))

ALL_LIBS = $(call libs_from,$(MODULES))
# the modules a module's tests link: itself and everything to its right
below = $(call libs_from,$(shell echo "$(MODULES)" | sed -E 's/.*(\b$(1)\b)/\1/'))

.PHONY: all
all: $(BUILD)/winnow cuda

define module_rules
OBJ_$(1) = $(patsubst %.c,$(BUILD)/obj/%.o,$(SRC_$(1)))
ifeq ($(1),kernels)
OBJ_$(1) += $(patsubst %.c,$(BUILD)/obj64/%.o,$(SRC_$(1)))
OBJ_$(1) += $(patsubst %,$(BUILD)/obj/%.o,$(basename $(SRC_cuda)))
endif
$(BUILD)/lib$(1).a: $$(OBJ_$(1))
	@rm -f $$@
	@$(AR) rcs $$@ $$^
-include $$(OBJ_$(1):.o=.d)
endef
$(foreach m,$(MODULES),$(eval $(call module_rules,$(m))))

$(BUILD)/obj/src/dist/%.o: src/dist/%.c
	@mkdir -p $(@D)
	$(call say,CC,$<)
	$(Q)$(MPICC) $(CPPFLAGS) $(ALL_CFLAGS) -c $< -o $@
$(BUILD)/obj/%.o: %.c
	@mkdir -p $(@D)
	$(call say,CC,$<)
	$(Q)$(CC) $(CPPFLAGS) $(ALL_CFLAGS) -c $< -o $@
$(BUILD)/obj/%.o: %.cu
	@mkdir -p $(@D)
	$(call say,NVCC,$<)
	$(Q)$(NVCC) -I. -Isrc $(NVCC_FLAGS) -MD -MP -MF $(@:.o=.d) -c $< -o $@
$(BUILD)/obj64/%.o: %.c
	@mkdir -p $(@D)
	$(call say,CC,$<)
	$(Q)$(CC) $(CPPFLAGS) -DWN_REAL64 $(ALL_CFLAGS) -c $< -o $@

$(BUILD)/winnow: $(BUILD)/obj/src/cli/main.o $(ALL_LIBS)
	$(call say,LINK,$@)
	$(Q)$(MPICC) -fopenmp -o $@ $< $(ALL_LIBS) $(LDLIBS)
-include $(BUILD)/obj/src/cli/main.d

# ---- tests: tests/unit/<module>_*.c links <module> and what lies below it; the other folders link everything
TESTS_SRC = $(wildcard tests/unit/*.c tests/gradient/*.c tests/parity/*.c tests/e2e/*.c)
TESTS_CUDA = $(patsubst tests/%.c,$(BUILD)/tests/%,$(wildcard tests/cuda/*.c))
TESTS = $(patsubst tests/%.c,$(BUILD)/tests/%,$(TESTS_SRC))
TEST_SUPPORT = $(patsubst %.c,$(BUILD)/obj/%.o,$(wildcard tests/support/*.c))
unit_module = $(firstword $(subst _, ,$(notdir $(1))))

.PHONY: cuda
cuda: $(if $(NVCC),$(TESTS_CUDA))
	@echo $(if $(NVCC),"CUDA: built with $(NVCC)","CUDA: nvcc is absent; the CUDA half is left out")

# kept, though only pattern rules name them
.SECONDARY: $(TEST_SUPPORT)
.SECONDEXPANSION:
$(BUILD)/tests/unit/%: tests/unit/%.c $(TEST_SUPPORT) $$(call below,$$(call unit_module,$$*))
	@mkdir -p $(@D)
	$(call say,LINK,$@)
	$(Q)$(MPICC) $(CPPFLAGS) -Itests $(ALL_CFLAGS) -MF $@.d -o $@ $< $(TEST_SUPPORT) $(call below,$(call unit_module,$*)) $(LDLIBS) $(TEST_LDLIBS)
$(BUILD)/tests/%: tests/%.c $(TEST_SUPPORT) $(ALL_LIBS)
	@mkdir -p $(@D)
	$(call say,LINK,$@)
	$(Q)$(MPICC) $(CPPFLAGS) -Itests $(ALL_CFLAGS) -MF $@.d -o $@ $< $(TEST_SUPPORT) $(ALL_LIBS) $(LDLIBS) $(TEST_LDLIBS)
$(BUILD)/obj/tests/%.o: tests/%.c
	@mkdir -p $(@D)
	$(call say,CC,$<)
	$(Q)$(CC) $(CPPFLAGS) -Itests $(ALL_CFLAGS) -c $< -o $@
-include $(wildcard $(BUILD)/tests/*/*.d) $(TEST_SUPPORT:.o=.d)

# ---- fuzzing: tests/fuzz/<target>.c, with clang's libFuzzer, AddressSanitizer and UndefinedBehaviorSanitizer
FUZZ_TARGETS = $(filter-out files fuzz,$(basename $(notdir $(wildcard tests/fuzz/*.c))))
FUZZ_RUNS ?= 1000000
FUZZ_JOBS ?= 1
FUZZ_CC ?= clang
FUZZ_FLAGS = -std=c11 -O1 -g -Wall -Wextra -Werror -Wno-unknown-pragmas -fno-omit-frame-pointer -fno-sanitize-recover=all \
  -fsanitize=address,undefined,float-cast-overflow $(FUZZ_CFLAGS)
FUZZ_LIBS ?= $(shell pkg-config --libs yaml-0.1 jansson 2>/dev/null) -lxxhash -lm
# the calls that tests/fuzz/files.c serves from memory
FUZZ_CALLS = open close stat fstat fsync read pread pwrite mmap munmap madvise rename unlink
FUZZ_SRC = $(SRC_config) $(SRC_io) $(SRC_base) src/model/params.c src/model/flops.c data/dataset.c tests/fuzz/files.c tests/fuzz/fuzz.c
FUZZ_OBJ = $(patsubst %.c,$(BUILD)/fuzz/obj/%.o,$(FUZZ_SRC))
$(BUILD)/fuzz/obj/%.o: %.c
	@mkdir -p $(@D)
	$(call say,CLANG,$<)
	$(Q)$(FUZZ_CC) $(CPPFLAGS) $(FUZZ_FLAGS) -fsanitize=fuzzer-no-link -MMD -MP -c $< -o $@
$(BUILD)/fuzz/libfuzzed.a: $(FUZZ_OBJ)
	@rm -f $@
	@$(AR) rcs $@ $^
$(BUILD)/fuzz/%: $(BUILD)/fuzz/obj/tests/fuzz/%.o $(BUILD)/fuzz/libfuzzed.a
	$(call say,LINK,$@)
	$(Q)$(FUZZ_CC) $(FUZZ_FLAGS) -fsanitize=fuzzer $(FUZZ_CALLS:%=-Wl,--wrap=%) -o $@ $^ $(FUZZ_LIBS)
# kept, though only a pattern rule names them
.SECONDARY: $(FUZZ_TARGETS:%=$(BUILD)/fuzz/obj/tests/fuzz/%.o)
-include $(FUZZ_OBJ:.o=.d) $(FUZZ_TARGETS:%=$(BUILD)/fuzz/obj/tests/fuzz/%.d)

# ---- what people call
DEB_PACKAGES = gcc make pkg-config libopenmpi-dev openmpi-bin libyaml-dev libjansson-dev libopenblas-dev libpcre2-dev libxxhash-dev libcmocka-dev gnuplot-nox

.PHONY: deps bench test test-gpu test-build fuzz demo demo-base demo-data mutate install help
deps:
	@sh configs/deps.sh $(DEB_PACKAGES)

test-build: deps
	@$(MAKE) --no-print-directory $(BUILD)/winnow $(TESTS)

# every test program, and the count
test: test-build
	@BUILD=$(BUILD) sh tests/run.sh $(TESTS)

# the tests that need a GPU; without one each says that it is skipped
test-gpu: deps
	@$(MAKE) --no-print-directory $(BUILD)/winnow $(TESTS_CUDA)
	@BUILD=$(BUILD) sh tests/run.sh $(TESTS_CUDA)

# tokens per second of each stage
bench: deps
	@$(MAKE) --no-print-directory $(BUILD)/winnow
	@WINNOW=$(BUILD)/winnow sh tests/bench.sh

# each target for FUZZ_RUNS inputs, on FUZZ_JOBS processes
fuzz: deps
	@FUZZ_CC=$(FUZZ_CC) sh tests/fuzz/probe.sh || sh configs/deps.sh clang libclang-rt-dev
	@$(MAKE) --no-print-directory $(FUZZ_TARGETS:%=$(BUILD)/fuzz/%)
	@BUILD=$(BUILD) FUZZ_RUNS=$(FUZZ_RUNS) FUZZ_JOBS=$(FUZZ_JOBS) sh tests/fuzz/run.sh $(FUZZ_TARGETS)

mutate: deps
	@sh configs/deps.sh patch
	@sh tests/faults/run.sh $(FAULTS)

demo: deps
	@$(MAKE) --no-print-directory $(BUILD)/winnow
	@WINNOW=$(BUILD)/winnow sh configs/jobs/demo/demo.sh checkpoints/demo

# trains the demo's base anew (minutes on a GPU, hours on two cores); the result is committed in checkpoints/demo-base
demo-base: deps
	@$(MAKE) --no-print-directory $(BUILD)/winnow
	@WINNOW=$(BUILD)/winnow sh configs/jobs/demo/base.sh checkpoints/demo

PREFIX ?= /usr/local
install: $(BUILD)/winnow
	install -d $(DESTDIR)$(PREFIX)/bin
	install -m 755 $(BUILD)/winnow $(DESTDIR)$(PREFIX)/bin/winnow

docs/options.md: $(BUILD)/winnow
	$(BUILD)/winnow options --markdown > $@

help:
	@echo "make            build $(BUILD)/winnow"
	@echo "make demo       warm-up, adapt and a dense control on real text, and a table of what came out"
	@echo "make demo-base  train the demo's base model again (wants a GPU)"
	@echo "make test       unit, gradient, parity, trap and end-to-end tests; a count at the end"
	@echo "make test-gpu   the tests of the CUDA half, on a machine with a GPU"
	@echo "make fuzz       feed FUZZ_RUNS=$(FUZZ_RUNS) made-up inputs to each reader of files (clang's libFuzzer)"
	@echo "make mutate     apply each fault in tests/faults to a copy and show that a test catches it"
	@echo "make bench      tokens per second of each stage, as a CSV"
	@echo "make deps       install what is missing from Debian (root or sudo)"
	@echo "make install    install the program under PREFIX ($(PREFIX))"
	@echo "make clean      remove $(BUILD)"

.PHONY: clean
clean:
	rm -rf $(BUILD)
