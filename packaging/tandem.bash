# bash completion for tandem. Options come from the subcommand's own --help, so that they are never stale.
_tandem() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]}
    local commands
    commands=$(tandem --help 2>/dev/null | sed -n 's/^  \([a-z]*\)  .*/\1/p')
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        mapfile -t COMPREPLY < <(compgen -W "$commands --help --version" -- "$cur")
        return
    fi
    case $prev in
    --think | --fusion | --sandbox) mapfile -t COMPREPLY < <(compgen -W "on off" -- "$cur") && return ;;
    --device) mapfile -t COMPREPLY < <(compgen -W "auto cpu cuda" -- "$cur") && return ;;
    --isa) mapfile -t COMPREPLY < <(compgen -W "auto portable avx2 avx512 avx512vnni avx512bf16" -- "$cur") && return ;;
    --repack) mapfile -t COMPREPLY < <(compgen -W "on memory off" -- "$cur") && return ;;
    --template)
        mapfile -t COMPREPLY < <(compgen -W "qwen3 qwen3-instruct-2507 qwen3-instruct-reasoning qwen3-thinking-2507 qwen2.5 qwen2 smollm2 chatml" -- "$cur")
        return
        ;;
    --path) mapfile -t COMPREPLY < <(compgen -W "fused standard T H" -- "$cur") && return ;;
    --kv-type) mapfile -t COMPREPLY < <(compgen -W "bf16 f16 f32 q8_0 fp8" -- "$cur") && return ;;
    --synthetic)
        mapfile -t COMPREPLY < <(compgen -W "qwen3-0.6b qwen3-1.7b qwen3-4b qwen3-8b qwen3-14b qwen3-32b" -- "$cur")
        return
        ;;
    --type)
        mapfile -t COMPREPLY < <(compgen -W "bf16 f16 f32 q8_0 q4_0 q4_1 q5_0 q5_1 q2_k q3_k_s q3_k_m q3_k_l q4_k_s q4_k_m q5_k_s q5_k_m q6_k" -- "$cur")
        return
        ;;
    --stage) mapfile -t COMPREPLY < <(compgen -W "weights ops model serving" -- "$cur") && return ;;
    --workload) mapfile -t COMPREPLY < <(compgen -W "offline-256" -- "$cur") && return ;;
    esac
    if [[ $cur == -* ]]; then
        local options
        options=$(tandem "${COMP_WORDS[1]}" --help 2>/dev/null | grep -oE -- '--[a-z0-9-]+' | sort -u)
        mapfile -t COMPREPLY < <(compgen -W "$options" -- "$cur")
        return
    fi
    mapfile -t COMPREPLY < <(compgen -f -- "$cur")
}
complete -o filenames -F _tandem tandem
