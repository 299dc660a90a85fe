"""VEENA: locate the emotion circuit, enhance it, and judge it honestly (Zhang et al. 2026, arXiv 2605.21980).

Names resolve on first use, so that one tool does not import the others.
"""

from __future__ import annotations

from veena_lens._lazy import homes_of, resolver

# Module -> its public names.
_HOMES = homes_of(
    __name__,
    {
        "enhance.baselines": (
            "Baseline adaptvis all_baselines pai plain_steering prompt_only scalingvis spin vaf vcd vista "
            "visual_directions"
        ),
        "enhance.contrastive_decoding": "guidance",
        "enhance.random_controls": "RandomUnits neuron_sizes random_directions random_heads random_neurons",
        "enhance.veena": "Adaptive ena fit_adaptive vee veena",
        "judge.evaluation": "Evaluation evaluate score_answers",
        "judge.fluency": "Fluency perplexity",
        "judge.held_out": "RandomControls random_controls",
        "judge.model_selection": (
            "HeadRankings compare_head_rankings conditions_of dose_response final_circuit rank_heads tune_baselines"
        ),
        "judge.side_effects": (
            "Asked Questions SideEffects answer_lengths attribute_accuracy described_accuracy distinct_n "
            "kl_from_plain latency_ratio measure_side_effects other_questions repetition"
        ),
        "judge.tuning": "Tuned fluency_ratio trial_score tune",
        "locate.answer_slot": "AnswerPosition answer_position emotion_tokens",
        "locate.boost_gradients": "head_boost_effects head_boost_gradients top_heads",
        "locate.directions": (
            "Directions TooFewPairs directions_from extract_directions noise_directions person_directions select_pairs "
            "shuffled_directions swapped_directions"
        ),
        "locate.heads": "KeyHeads best_rows execution_heads head_effects head_readings key_heads specificity",
        "locate.layers": "KeyLayers key_layers",
        "locate.neurons": "KeyNeurons key_neurons neuron_projections strongest_neurons",
        "locate.tracing": "Stages find_stages projection_of stage_bounds trace_back",
        "methods": "Method generate_answers next_logits",
        "pairs.contexts": "context_conditions context_sentence",
        "pairs.loading": (
            "Example Pair PairProblems PairSet load_pairs pairs_from_dataset pairs_from_folders "
            "pairs_from_records save_pairs write_manifest"
        ),
        "pairs.parts": "part_identities spread_examples",
        "pipeline": "VeenaRun run_veena",
        "planted.circuit": "Plant plant_circuit",
        "results": "main_table part_table results_of save_results",
        "settings": "Settings preset",
        "study": "Asking Study",
        "words.lexicon": "LabelExtractor Lexicon extract_emotions string_to_list",
        "words.scores": "sentiment_score",
        "words.wheel": "Wheel",
        "words.wheels": "EmotionWheels hit_rate open_vocabulary_score sample_hit sample_hits token_hit_rate",
    },
)
__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__ = resolver(__name__, _HOMES)
