//! Measuring in turns, medians, ratios, and what is done with them.

use std::fs;
use std::path::Path;
use std::time::Instant;

use serde_json::{Map, Value, json};

use crate::Result;

/// Something that is measured again and again: gives one figure, e.g. seconds or bytes a second.
pub type Measure<'a> = (&'a str, Box<dyn FnMut() -> Result<f64> + 'a>);

/// All results so far.
#[derive(Debug)]
pub struct Results {
    rounds: usize,
    entries: Map<String, Value>,
}

impl Results {
    pub fn new(rounds: usize) -> Self {
        Self { rounds, entries: Map::new() }
    }

    /// Measures all in turns, `factor` times the usual number; gives the median of each.
    pub fn medians(&self, factor: usize, measures: &mut [Measure<'_>]) -> Result<Vec<f64>> {
        let mut figures = vec![Vec::new(); measures.len()];
        for _ in 0..self.rounds * factor {
            for (figures, (what, measure)) in figures.iter_mut().zip(measures.iter_mut()) {
                let figure = measure()?;
                eprintln!("bench:   {what}: {figure:.4}");
                figures.push(figure);
            }
        }
        Ok(figures.into_iter().map(median).collect())
    }

    /// Records `name` = `over` / `under`, and the bound that it should reach.
    pub fn ratio(&mut self, name: &str, over: (&str, f64), under: (&str, f64), wanted: Wanted) {
        let value = over.1 / under.1;
        let of = json!({ over.0: over.1, under.0: under.1 });
        self.put(name, value, "ratio", of, wanted);
    }

    pub fn put(&mut self, name: &str, value: f64, unit: &str, of: Value, wanted: Wanted) {
        let (bound, reached) = match wanted {
            Wanted::AtLeast(bound) => (format!("at least {bound}"), value >= bound),
            Wanted::AtMost(bound) => (format!("at most {bound}"), value <= bound),
            Wanted::Nothing => (String::new(), true),
        };
        let entry = json!({"value": value, "unit": unit, "of": of, "n": self.rounds, "wanted": bound, "reached": reached});
        self.entries.insert(name.to_owned(), entry);
    }

    pub fn print(&self) {
        println!("{:<28} {:>9}  {:<6} {:<15} of", "name", "value", "unit", "wanted");
        for (name, entry) in &self.entries {
            let mark = if entry["reached"] == true { "" } else { "  NOT REACHED" };
            println!(
                "{name:<28} {:>9.3}  {:<6} {:<15} {}{mark}",
                entry["value"].as_f64().unwrap_or_default(),
                entry["unit"].as_str().unwrap_or_default(),
                entry["wanted"].as_str().unwrap_or_default(),
                entry["of"],
            );
        }
    }

    pub fn write(&self) -> Result<()> {
        let dir = crate::data::directory();
        fs::create_dir_all(&dir)?;
        let path = dir.join("results.json");
        // What was measured in earlier runs and not in this one stays.
        let mut all = read(&path);
        all.extend(self.entries.clone());
        fs::write(&path, serde_json::to_vec_pretty(&Value::Object(all))?)?;
        println!("\n{}", path.display());
        Ok(())
    }
}

fn read(path: &Path) -> Map<String, Value> {
    fs::read(path).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default()
}

/// What a value should be.
#[derive(Clone, Copy, Debug)]
pub enum Wanted {
    AtLeast(f64),
    AtMost(f64),
    Nothing,
}

/// How long `work` takes, in seconds.
pub fn seconds(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let begun = Instant::now();
    work()?;
    Ok(begun.elapsed().as_secs_f64())
}

pub fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    let middle = figures.len() / 2;
    if figures.len() % 2 == 1 { figures[middle] } else { (figures[middle - 1] + figures[middle]) / 2.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
    }
}
