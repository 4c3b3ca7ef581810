# make demo [WORLD=laptop|homelab|team|agents] [EXERCISE=1] [ENGINE=standin|llama [GGUF=a.gguf,b.gguf]]
# make test      everything; make quick: without Docker, llama-server and Prometheus
# make mutants [FAULTS="name ..."]   do the scheduler's tests notice seeded faults?
# make bench [ROWS="json-32 paced ..."] [ROUNDS=5] [SECONDS=3] [OUT=docs]   beside nginx; needs wrk, too
# make bench-instructions [REQUESTS=1000]   what a proxied request costs, by valgrind
# make bench-swap                           what a swap costs beyond the engines' own stop and start
# make bench-read-ahead                     what reading the next model's files ahead saves (2 GB of disk)

WORLD ?= laptop
ENGINE ?= standin
worlds = laptop homelab team agents
engines = standin llama
demo_flags = --world $(WORLD) $(if $(EXERCISE),--exercise) $(if $(ONCE),--once)

# Before anything is built.
ifneq ($(filter demo,$(MAKECMDGOALS)),)
ifeq ($(filter $(WORLD),$(worlds)),)
$(error WORLD=$(WORLD) is none of: $(worlds))
endif
ifeq ($(filter $(ENGINE),$(engines)),)
$(error ENGINE=$(ENGINE) is none of: $(engines))
endif
ifeq ($(ENGINE) $(filter-out laptop,$(WORLD)),llama $(WORLD))
$(error ENGINE=llama has one world, laptop: leave WORLD=$(WORLD) out)
endif
endif

ROUNDS ?= 5
SECONDS ?= 3
STREAMS ?= 8000
OUT ?= .cache/bench
REQUESTS ?= 1000

.PHONY: demo test quick build mutants bench bench-instructions bench-swap bench-read-ahead
build:
	cargo build --locked --bin wharf

demo: build
ifeq ($(ENGINE),llama)
	@server=$$(tests/support/setup.sh llama mistral coder llava) && \
	target/debug/wharf demo $(demo_flags) --llama-server "$$server" \
	  $(if $(GGUF),--gguf $(GGUF),--gguf-names-itself --gguf .cache/gguf/mistral.gguf,.cache/gguf/coder.gguf,.cache/gguf/llava.gguf)
else
	@target/debug/wharf demo $(demo_flags)
endif

test:
	tests/run.sh

quick:
	tests/run.sh quick

bench-swap:
	benches/swap/run.sh

bench-read-ahead:
	benches/read_ahead/run.sh

mutants:
	tests/mutants/run.sh $(FAULTS)

# The profile is the release's; CARGO_PROFILE_RELEASE_LTO=off and …_CODEGEN_UNITS=16 build faster, and slower code.
bench:
	@tests/support/setup.sh bench
	PATH="$$PATH:/usr/sbin" cargo bench --locked --bench proxy -- --rounds $(ROUNDS) --seconds $(SECONDS) \
	  --streams $(STREAMS) --out "$(abspath $(OUT))" $(if $(ROWS),--rows "$(ROWS)")

bench-instructions:
	@tests/support/setup.sh valgrind
	benches/proxy/instructions.sh $(REQUESTS)
