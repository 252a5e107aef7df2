"""Array maths on the hot path: one contract (`reference`), several implementations. Knows no model."""
