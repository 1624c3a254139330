"""The words on the pages, by language: at most 7 letters, so that they fit into the narrowest column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Language = Literal["de", "en", "es", "fr"]


@dataclass(frozen=True)
class Words:
    """The words of one language by their use on a page; each word has one use."""

    menu: tuple[str, ...]
    heading: tuple[str, ...]
    action: tuple[str, ...]
    label: tuple[str, ...]
    item: tuple[str, ...]


def _words(menu: str, heading: str, action: str, label: str, item: str) -> Words:
    return Words(*(tuple(words.split()) for words in (menu, heading, action, label, item)))


WORDS: dict[Language, Words] = {
    "de": _words(
        "Start Laden Über Hilfe Konto Blog Presse Karte",
        "Garten Tee Reise Musik Küche Wetter Sport Bücher",
        "Kaufen Senden Suchen Weiter Öffnen Teilen Ja Nein",
        "Name Mail Ort Stadt Datum Telefon Straße Alter",
        "Apfel Brot Milch Reis Salz Käse Honig Nudeln",
    ),
    "en": _words(
        "Home Shop About Help Account Blog Press Map",
        "Garden Tea Travel Music Kitchen Weather Sports Books",
        "Buy Send Search Next Open Share Yes No",
        "Name Email Place City Date Phone Street Age",
        "Apple Bread Milk Rice Salt Cheese Honey Pasta",
    ),
    "es": _words(
        "Inicio Tienda Equipo Ayuda Cuenta Blog Prensa Mapa",
        "Jardín Té Viaje Música Cocina Tiempo Deporte Libros",
        "Comprar Enviar Buscar Seguir Abrir Guardar Sí No",
        "Nombre Correo Lugar Ciudad Fecha Móvil Calle Edad",
        "Manzana Pan Leche Arroz Sal Queso Miel Pasta",
    ),
    "fr": _words(
        "Accueil Magasin Équipe Aide Compte Blog Presse Carte",
        "Jardin Thé Voyage Musique Cuisine Météo Sport Livres",
        "Acheter Envoyer Trouver Suivant Ouvrir Partage Oui Non",
        "Nom Mail Lieu Ville Date Mobile Rue Âge",
        "Pomme Pain Lait Riz Sel Fromage Miel Pâtes",
    ),
}
