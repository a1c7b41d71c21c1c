//! Stop strings never show, not even in part, and everything before them does, however the text was cut.

use super::Seeded;
use dylm::stop::{Emit, Stop};

fn stop(strings: &[&str]) -> Stop {
    Stop::new([2, 7], strings.iter().map(|s| s.to_string())).unwrap()
}

/// What is shown of the pieces, and which string stopped them.
fn show(strings: &[&str], pieces: &[&str]) -> (String, Option<String>) {
    let (mut stop, mut shown) = (stop(strings), String::new());
    for piece in pieces {
        let Emit { text, stopped } = stop.push(piece);
        shown += &text;
        if stopped {
            return (shown, stop.matched().map(str::to_string));
        }
    }
    shown += &stop.finish();
    (shown, None)
}

#[test]
fn eos_tokens_end_the_sequence_and_others_do_not() {
    let stop = stop(&[]);
    assert!(stop.ends(2) && stop.ends(7) && !stop.ends(3));
}

#[test]
fn a_suffix_waits_only_while_it_could_become_a_stop_string() {
    let mut stop = stop(&["STOP"]);
    let emit = |text: &str| Emit { text: text.into(), stopped: false };
    assert_eq!(stop.push("hello ST"), emit("hello "));
    assert_eq!(stop.push("A"), emit("STA"));
    assert_eq!(stop.push("S"), emit(""));
    assert_eq!(stop.push("S"), emit("S"));
    assert_eq!(stop.push("TO"), emit(""));
    assert_eq!(stop.push("P and more"), Emit { text: String::new(), stopped: true });
    assert_eq!(stop.matched(), Some("STOP"));
    assert_eq!(stop.push("again"), Emit { text: String::new(), stopped: true });
    assert_eq!(stop.finish(), "");
}

#[test]
fn finish_lets_out_what_waited() {
    assert_eq!(show(&["</s>"], &["a <", "/"]), ("a </".into(), None));
    assert_eq!(show(&[], &["a", "b"]), ("ab".into(), None));
    let mut stop = stop(&["</s>"]);
    stop.push("<");
    assert_eq!((stop.finish().as_str(), stop.finish().as_str()), ("<", ""));
}

#[test]
fn a_string_spans_many_pieces_and_overlaps_itself() {
    assert_eq!(show(&["\nUser:"], &["Hi", "\n", "Us", "", "er", ":", "x"]), ("Hi".into(), Some("\nUser:".into())));
    assert_eq!(show(&["aab"], &["a", "a", "a", "b"]), ("a".into(), Some("aab".into())));
    assert_eq!(show(&["abab!"], &["aba", "babab!"]), ("abab".into(), Some("abab!".into())));
}

#[test]
fn the_string_completed_first_wins_and_the_longest_of_those() {
    assert_eq!(show(&["world", "lo w"], &["hello world"]).0, "hel");
    assert_eq!(show(&["bcd", "abcdef"], &["xabcdef"]), ("xa".into(), Some("bcd".into())));
    assert_eq!(show(&["c", "abc", "bc"], &["xabc"]), ("x".into(), Some("abc".into())));
}

#[test]
fn characters_of_several_bytes_are_never_cut() {
    assert_eq!(show(&["終わり"], &["物語は終", "わ", "り。"]).0, "物語は");
    assert_eq!(show(&["終わり"], &["終了"]).0, "終了");
    // é and è share their first byte, 🎉 and 🎊 their first three.
    assert_eq!(show(&["é"], &["è", "é"]).0, "è");
    assert_eq!(show(&["🎊"], &["🎉🎊🎉"]).0, "🎉");
}

#[test]
fn an_empty_stop_string_is_refused() {
    let error = Stop::new([], [String::new()]).unwrap_err().to_string();
    assert_eq!(error, "stop: an empty string would stop before the first word: remove it");
}

#[test]
fn the_cut_of_the_text_makes_no_difference() {
    let mut seeded = Seeded::new(6);
    let alphabet = ['a', 'b', 'é', '🎉'];
    for _ in 0..500 {
        let mut word =
            |longest: usize| -> String { (0..1 + seeded.below(longest)).map(|_| seeded.pick(&alphabet)).collect() };
        let (text, one, two) = (word(40), word(4), word(6));
        let whole = show(&[&one, &two], &[&text]);
        let characters: Vec<String> = text.chars().map(String::from).collect();
        let pieces: Vec<String> = characters.chunks(1 + seeded.below(3)).map(|c| c.concat()).collect();
        for cut in [&characters, &pieces] {
            let cut: Vec<&str> = cut.iter().map(String::as_str).collect();
            assert_eq!(show(&[&one, &two], &cut), whole, "{text:?} cut at {cut:?}");
        }
        // The slow definition: the match that ends first, the longest of those that end there.
        let ends = |s: &str| text.find(s).map(|start| (start + s.len(), start));
        let first = [ends(&one), ends(&two)].into_iter().flatten().min();
        assert_eq!(whole.0, &text[..first.map_or(text.len(), |(_, start)| start)]);
    }
}
