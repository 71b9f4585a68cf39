//! Plots as SVG text.
//!
//! Owns colours and scales. Every number that is drawn is also in a table beside it: plots only show the shape. Must not know what was measured.

use anyhow::Result;
use plotters::prelude::*;

use crate::text::number;

const INK: RGBColor = RGBColor(40, 44, 52);
const FAINT: RGBColor = RGBColor(150, 155, 165);
const FONT: &str = "sans-serif";

/// The colour of an origin.
pub fn colour(origin: &str) -> RGBColor {
    match origin {
        "stock" => RGBColor(74, 103, 160),
        "simulated" => RGBColor(205, 122, 33),
        _ => RGBColor(20, 128, 92),
    }
}

/// A named point or bar.
pub struct Mark<'a> {
    /// Its label.
    pub name: &'a str,
    /// What decides over its colour.
    pub origin: &'a str,
    /// Points of one family are joined by a line.
    pub family: Option<&'a str>,
    /// Place on the horizontal axis.
    pub x: f64,
    /// Place on the vertical axis; unused for bars.
    pub y: f64,
}

/// The range of positive numbers, a little wider than they are.
fn wide(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values.filter(|v| *v > 0.0).fold((f64::INFINITY, 0.0f64), |(l, h), v| (l.min(v), h.max(v)));
    if high == 0.0 {
        return (0.1, 1.0);
    }
    (low / 1.6, high * 1.6)
}

/// How far each label must go down to keep off those before it. Places are shares of the plot's width and height.
fn apart(places: &[(f64, f64)]) -> Vec<i32> {
    let mut taken: Vec<(f64, f64)> = vec![];
    let down = places.iter().map(|(x, y)| {
        let (x, y, mut down) = (x * 770.0, y * 410.0, 0);
        while taken.iter().any(|(a, b)| (a - x).abs() < 120.0 && (b - y - f64::from(down)).abs() < 13.0) {
            down += 13;
        }
        taken.push((x, y + f64::from(down)));
        down
    });
    down.collect()
}

/// The marks of each family, from left to right.
fn lines<'a, 'b>(marks: &[&'b Mark<'a>]) -> Vec<Vec<&'b Mark<'a>>> {
    let mut lines: Vec<Vec<&Mark>> = vec![];
    for mark in marks.iter().filter(|m| m.family.is_some()) {
        match lines.iter_mut().find(|l| l[0].family == mark.family) {
            Some(line) => line.push(mark),
            None => lines.push(vec![mark]),
        }
    }
    lines.iter_mut().for_each(|l| l.sort_by(|a, b| a.x.total_cmp(&b.x)));
    lines
}

/// Points on two logarithmic axes; marks at 0 cannot be shown and are left out.
pub fn scatter(marks: &[Mark], x: &str, y: &str) -> Result<String> {
    let shown: Vec<&Mark> = marks.iter().filter(|m| m.x > 0.0 && m.y > 0.0).collect();
    let (x0, x1) = wide(shown.iter().map(|m| m.x));
    let (y0, y1) = wide(shown.iter().map(|m| m.y));
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (860, 480)).into_drawing_area();
        // Room on the right for the labels of the last points.
        let axes = ((x0..x1 * 1.5).log_scale(), (y0..y1).log_scale());
        let mut chart = ChartBuilder::on(&root).margin(12).x_label_area_size(44).y_label_area_size(72).build_cartesian_2d(axes.0, axes.1)?;
        let (number_x, number_y) = (|v: &f64| number(*v), |v: &f64| number(*v));
        chart
            .configure_mesh()
            .x_desc(x)
            .y_desc(y)
            .x_label_formatter(&number_x)
            .y_label_formatter(&number_y)
            .light_line_style(RGBColor(244, 245, 247))
            .bold_line_style(RGBColor(224, 227, 232))
            .axis_style(FAINT)
            .label_style((FONT, 12).into_font().color(&INK))
            .draw()?;
        for line in lines(&shown) {
            let colour = colour(line[0].origin);
            let points: Vec<_> = line.iter().map(|m| (m.x, m.y)).collect();
            chart.draw_series(std::iter::once(PathElement::new(points, colour.mix(0.5))))?;
        }
        let labels = apart(&shown.iter().map(|m| ((m.x / x0).ln() / (x1 * 1.5 / x0).ln(), (y1 / m.y).ln() / (y1 / y0).ln())).collect::<Vec<_>>());
        chart.draw_series(shown.iter().zip(labels).map(|(m, down)| {
            EmptyElement::at((m.x, m.y))
                + Circle::new((0, 0), 4, colour(m.origin).filled())
                + Text::new(m.name.to_string(), (7, down - 5), (FONT, 12).into_font().color(&colour(m.origin)))
        }))?;
        root.present()?;
    }
    Ok(svg)
}

/// Horizontal bars on a logarithmic scale, with their numbers; a bar of 0 has no length.
pub fn bars(marks: &[Mark]) -> Result<String> {
    const LEFT: i32 = 170;
    const WIDTH: i32 = 860;
    const STEP: i32 = 22;
    let (low, high) = wide(marks.iter().map(|m| m.x));
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (WIDTH as u32, (marks.len() as i32 * STEP + 8) as u32)).into_drawing_area();
        for (i, m) in marks.iter().enumerate() {
            let y = 4 + i as i32 * STEP;
            let share = if m.x > 0.0 { (m.x / low).ln() / (high / low).ln() } else { 0.0 };
            let end = LEFT + (share * f64::from(WIDTH - LEFT - 80)) as i32;
            root.draw(&Text::new(m.name.to_string(), (4, y + 4), (FONT, 12).into_font().color(&INK)))?;
            root.draw(&Rectangle::new([(LEFT, y + 2), (end, y + STEP - 4)], colour(m.origin).filled()))?;
            root.draw(&Text::new(number(m.x), (end + 6, y + 4), (FONT, 12).into_font().color(&INK)))?;
        }
        root.present()?;
    }
    Ok(svg)
}

/// How a number becomes a colour.
#[derive(Clone, Copy)]
pub enum Scale {
    /// 0 is bad and 1 is good.
    Share,
    /// 0.001 and less is good, 1 and more is bad, by magnitude.
    Error,
    /// Of a whole that comes from many: 0.001 and less is little, 0.3 and more is much, by magnitude.
    Part,
}

impl Scale {
    /// 0 for good, 1 for bad.
    fn badness(self, x: f64) -> f64 {
        let b = match self {
            Scale::Share => 1.0 - x,
            _ if x <= 0.0 => 0.0,
            Scale::Error => x.log10() / 3.0 + 1.0,
            Scale::Part => (x / 0.3).log10() / 2.5 + 1.0,
        };
        b.clamp(0.0, 1.0)
    }

    fn colour(self, x: f64) -> RGBColor {
        // White, yellow, dark red.
        const STOPS: [(f64, f64, f64); 3] = [(247.0, 250.0, 247.0), (246.0, 196.0, 84.0), (150.0, 28.0, 36.0)];
        let at = self.badness(x) * 2.0;
        let (a, b, t) = if at < 1.0 { (STOPS[0], STOPS[1], at) } else { (STOPS[1], STOPS[2], at - 1.0) };
        let mix = |a: f64, b: f64| (a + (b - a) * t).round() as u8;
        RGBColor(mix(a.0, b.0), mix(a.1, b.1), mix(a.2, b.2))
    }
}

/// Coloured cells, with their numbers where there is room for them.
pub fn heat_map(rows: &[(String, Vec<Option<f64>>)], columns: &[String], scale: Scale) -> Result<String> {
    const LEFT: i32 = 170;
    const TOP: i32 = 22;
    let n = columns.len().max(1) as i32;
    let width = (680 / n).clamp(6, 80);
    let height = if rows.len() > 20 { 10 } else { 20 };
    let has_text = width >= 40 && height >= 20;
    let mut svg = String::new();
    {
        let size = ((LEFT + n * width + 8) as u32, (TOP + rows.len() as i32 * height + 4) as u32);
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        let small = |c: &RGBColor| (FONT, 11).into_font().color(c);
        for (j, name) in columns.iter().enumerate() {
            if has_text || j % 8 == 0 {
                root.draw(&Text::new(name.clone(), (LEFT + j as i32 * width + 4, 6), small(&INK)))?;
            }
        }
        for (i, (name, values)) in rows.iter().enumerate() {
            let y = TOP + i as i32 * height;
            if height >= 20 || i % 4 == 0 {
                root.draw(&Text::new(name.clone(), (4, y + (height - 12) / 2), small(&INK)))?;
            }
            for (j, value) in values.iter().enumerate() {
                let Some(value) = value else { continue };
                let x = LEFT + j as i32 * width;
                root.draw(&Rectangle::new([(x, y), (x + width - 1, y + height - 1)], scale.colour(*value).filled()))?;
                if has_text {
                    let ink = if scale.badness(*value) > 0.7 { WHITE } else { INK };
                    root.draw(&Text::new(number(*value), (x + 6, y + (height - 12) / 2), small(&ink)))?;
                }
            }
        }
        root.present()?;
    }
    Ok(svg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plots_hold_what_can_be_drawn() {
        let marks = [
            Mark { name: "f16", origin: "stock", family: None, x: 96.0, y: 0.0 },
            Mark { name: "<q4>", origin: "stock", family: Some("stock"), x: 27.0, y: 0.01 },
        ];
        let svg = scatter(&marks, "MiB", "KL").unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("&lt;q4&gt;") && !svg.contains("f16"), "{svg}");
        assert!(scatter(&[], "x", "y").is_ok());
        assert!(bars(&marks).unwrap().contains("f16"));
        let map = heat_map(&[("layer 0".into(), vec![Some(0.5), None])], &["a".into(), "b".into()], Scale::Error).unwrap();
        assert!(map.contains("0.500") && map.contains("layer 0"), "{map}");
    }

    #[test]
    fn lines_join_families() {
        let mark = |name, family, x| Mark { name, origin: "stock", family, x, y: 1.0 };
        let marks = [mark("q8", Some("q"), 2.0), mark("f16", None, 3.0), mark("q4", Some("q"), 1.0), mark("t", Some("t"), 1.0)];
        let joined: Vec<Vec<&str>> = lines(&marks.iter().collect::<Vec<_>>()).iter().map(|l| l.iter().map(|m| m.name).collect()).collect();
        assert_eq!(joined, [vec!["q4", "q8"], vec!["t"]]);
    }

    #[test]
    fn labels_keep_off_each_other() {
        assert_eq!(apart(&[(0.1, 0.5), (0.12, 0.5), (0.9, 0.5), (0.1, 0.51), (0.1, 0.9)]), [0, 13, 0, 26, 0]);
    }

    #[test]
    fn scales_go_from_good_to_bad() {
        assert_eq!([0.0, 0.001, 1.0, 5.0].map(|x| Scale::Error.badness(x)), [0.0, 0.0, 1.0, 1.0]);
        assert_eq!([1.0, 0.25, 0.0].map(|x| Scale::Share.badness(x)), [0.0, 0.75, 1.0]);
    }
}
